"""What is no base, with the command that makes one of it; and token ids that no row of the embeddings belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.models.headers import read_headers
from recipes.models.refusals import dequantize_command
from recipes.models.token_ids import token_problems, tokens_of
from recipes.problem import Problem, RecipeError
from tests.recipes.folders import write_base


def refused(folder: Path, **config: Any) -> Problem:
    with pytest.raises(RecipeError) as caught:
        read_headers(write_base(folder, config=config))
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("method", "maker"), [("fp8", "FineGrainedFP8Config"), ("mxfp4", "Mxfp4Config"), ("gptq", None), ("awq", None)]
)
def test_a_quantized_release_says_how_to_get_bf16_weights(tmp_path: Path, method: str, maker: str | None):
    quantization = {"quant_method": method}
    problem = refused(tmp_path, quantization_config=quantization, architectures=["Mistral3ForConditionalGeneration"])
    assert f"quantized already ({method})" in problem.what
    if maker is None:
        assert "Name the original" in problem.next
    else:
        assert f"t.{maker}(dequantize=True)" in problem.next and "t.Mistral3ForConditionalGeneration" in problem.next


@pytest.mark.parametrize(
    "head", ["LlamaForSequenceClassification", "BertForMaskedLM", "LlamaForTokenClassification", "Qwen2ForRewardModel"]
)
def test_a_base_that_makes_no_text(tmp_path: Path, head: str):
    problem = refused(tmp_path, architectures=[head])
    assert head in problem.what and problem.where.endswith("architectures")


def test_an_encoder_decoder(tmp_path: Path):
    assert "encoder-decoder" in refused(tmp_path, is_encoder_decoder=True).what


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "Gemma3ForConditionalGeneration", "GPT2LMHeadModel"])
def test_what_makes_text_is_accepted(tmp_path: Path, head: str):
    assert read_headers(write_base(tmp_path, config={"architectures": [head]})).linears


# ---- token ids


def write_tokenizer(folder: Path, *, vocabulary: int = 300, added: list[dict[str, Any]] | None = None, **config: Any):
    tokens = {f"t{number}": number for number in range(vocabulary)}
    tokenizer = {"model": {"type": "BPE", "vocab": tokens}, "added_tokens": added or []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"chat_template": "{{ messages }}<turn>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def special(name: str, number: int, *, plain: bool = False) -> dict[str, Any]:
    return {"content": name, "id": number, "special": not plain}


def test_as_many_tokens_as_rows_or_fewer(tmp_path: Path):
    write_base(tmp_path)
    for vocabulary in (300, 200):
        write_tokenizer(tmp_path, vocabulary=vocabulary)
        assert token_problems(read_headers(tmp_path)) == []


@pytest.mark.parametrize(
    ("vocabulary", "added", "config", "shown"),
    [
        (305, [], {}, "t300 (300)"),
        (300, [special("[PAD]", 300)], {"pad_token": "[PAD]"}, "[PAD] (300)"),
        (300, [special("[PAD]", 300)], {"pad_token": {"content": "[PAD]"}}, "[PAD] (300)"),
        (300, [special("<turn>", 300)], {}, "<turn> (300)"),
        (300, [special("domain", 300, plain=True)], {}, "domain (300)"),
        (300, [], {"added_tokens_decoder": {"301": {"content": "<late>"}}}, "<late> (301)"),
    ],
)
def test_tokens_without_a_row(
    tmp_path: Path, vocabulary: int, added: list[dict[str, Any]], config: dict[str, Any], shown: str
):
    write_tokenizer(write_base(tmp_path), vocabulary=vocabulary, added=added, **config)
    (problem,) = token_problems(read_headers(tmp_path))
    assert shown in problem.what and "embeddings end at 299" in problem.why
    assert f"resize_token_embeddings({max(tokens_of(tmp_path).values()) + 1}" in problem.next


def test_a_special_token_that_nothing_writes_may_lie_behind_the_rows(tmp_path: Path):
    """Gemma 3 1B has the tokenizer of the others, with `<image_soft_token>` as number 262,144 of 262,144 rows."""
    write_tokenizer(write_base(tmp_path), added=[special("<image_soft_token>", 300)])
    assert token_problems(read_headers(tmp_path)) == []


def test_a_unigram_vocabulary_is_numbered_by_place(tmp_path: Path):
    write_base(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [[f"t{n}", -1.0] for n in range(301)]}}))
    assert "t300 (300)" in token_problems(read_headers(tmp_path))[0].what


@pytest.mark.parametrize("number", [-1, 300])
def test_a_padding_id_that_is_no_row(tmp_path: Path, number: int):
    (problem,) = token_problems(read_headers(write_base(tmp_path, config={"pad_token_id": number})))
    assert f"pad_token_id is {number}" in problem.what and "config.json" in problem.where
    write_base(tmp_path, config={"pad_token_id": 299})
    (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": number}))
    (problem,) = token_problems(read_headers(tmp_path))
    assert problem.where.endswith("generation_config.json pad_token_id")
    (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": None}))
    assert token_problems(read_headers(tmp_path)) == []


def test_the_command_for_fp8_writes_plain_bf16_weights(tmp_path: Path):
    """A tiny FP8 release in DeepSeek's layout, through the very line that the refusal prints."""
    import shlex
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    folder = tmp_path / "fp8"
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if "_proj" in name]:
        stored[name] = torch.randn(128, 128).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    _, *words = shlex.split(dequantize_command(folder, config, "FineGrainedFP8Config"))
    subprocess.run([sys.executable, "-P", *words], check=True, capture_output=True)
    written = load_file(tmp_path / "fp8-bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(written[name], (stored[name].float() * 0.5).bfloat16())
    assert written.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    (tmp_path / "fp8-bf16" / "tokenizer.json").write_text("{}")
    assert len(read_headers(tmp_path / "fp8-bf16").linears) == 7
    assert "quantization_config" not in json.loads((tmp_path / "fp8-bf16" / "config.json").read_text())


def test_the_command_for_mxfp4_writes_plain_bf16_weights(tmp_path: Path):
    """gpt-oss in its release's layout: blocks of 32 inputs as 16 bytes, and an exponent each."""
    import shlex
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    folder = tmp_path / "mxfp4"
    GptOssForCausalLM(GptOssConfig(**sizes, **heads, eos_token_id=1)).save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts"
    stored = {key: value for key, value in plain.items() if not key.endswith(("gate_up_proj", "down_proj"))}
    for part, rows, inputs in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
        stored[f"{name}.{part}_blocks"] = torch.full((4, rows, inputs // 32, 16), 0x22, dtype=torch.uint8)  # 1.0
        stored[f"{name}.{part}_scales"] = torch.full((4, rows, inputs // 32), 128, dtype=torch.uint8)  # 2 ** 1
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    _, *words = shlex.split(dequantize_command(folder, config, "Mxfp4Config"))
    subprocess.run([sys.executable, "-P", *words], check=True, capture_output=True)
    written = load_file(tmp_path / "mxfp4-bf16" / "model.safetensors")
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in plain.items()}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written[f"{name}.down_proj"], torch.full((4, 96, 64), 2.0, dtype=torch.bfloat16))
    (tmp_path / "mxfp4-bf16" / "tokenizer.json").write_text("{}")
    assert len(read_headers(tmp_path / "mxfp4-bf16").stacked_experts) == 2
