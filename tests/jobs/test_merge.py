"""The merge is faithful to the adapter on NF4, and a wrong scale shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.jobs import merge
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job
from tests.jobs.quantized import mean_kl
from tests.tiny import write_base

FAITHFUL = (
    1e-4  # nats: measured 1.1e-5 to 1.7e-5 here; 6e-4 to 9e-4 with alpha / r x 1.1; 5e-3 to 7e-3 on the original base
)
TURNS = [{"role": "user", "content": "what colour ?"}, {"role": "assistant", "content": "blue"}]


def plant_adapter(base: Path, folder: Path, *, seed: int = 0) -> Path:
    """A LoRA of rank 8 on all linear layers with random A and B, big enough to change the answers."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_bf16(base, device="cpu"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(base / name, folder / "tokenizer" / name)
    return folder


@torch.no_grad()
def log_probs(model: torch.nn.Module) -> torch.Tensor:
    """[rows * tokens, vocab] in fp32 on fixed random tokens."""
    tokens = torch.randint(4, 300, (8, 64), generator=torch.Generator().manual_seed(1))
    return model(tokens).logits.float().log_softmax(-1).flatten(0, 1)


def merge_onto(onto: str, base: Path, adapter: Path, out: Path) -> Path:
    merge.run(make_job("merge", out, params={"onto": onto}, base=base, adapter=adapter))
    return out


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp(request.param), architecture=request.param)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_adapter(base, tmp_path_factory.mktemp("adapter"))


def test_merged_dequantized_is_the_trained_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    reference = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    cost = {
        onto: mean_kl(reference, log_probs(load_bf16(merge_onto(onto, base, adapter, tmp_path / onto), device="cpu")))
        for onto in ("dequantized", "original")
    }
    assert cost["dequantized"] < FAITHFUL
    assert cost["dequantized"] < cost["original"] / 10

    config = json.loads((adapter / "adapter_config.json").read_text())
    wrong = shutil.copytree(adapter, tmp_path / "wrong")
    (wrong / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 1.1}))
    off = mean_kl(
        reference, log_probs(load_bf16(merge_onto("dequantized", base, wrong, tmp_path / "off"), device="cpu"))
    )
    assert not off < FAITHFUL


def test_the_folder_is_a_plain_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = merge_onto("dequantized", base, adapter, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert set(load_file(out / "model.safetensors")) == set(load_file(base / "model.safetensors"))  # still tied
    for path in (adapter / "tokenizer").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    render = {"tokenize": False, "add_generation_prompt": True}
    before, after = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, **render) for folder in (base, out)
    )
    assert before == after
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*.json"))


def test_untied_embeddings_stay_untied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    out = merge_onto("original", base, plant_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_nan_in_the_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(StageError, match="inf or NaN") as refused:
        merge_onto("original", base, broken, tmp_path / "out")
    assert name in refused.value.problem.where
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_adapter_of_another_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    strange = shutil.copytree(adapter, tmp_path / "strange")
    tensors = load_file(strange / "adapter_model.safetensors")
    renamed = {key.replace("layers.1.", "layers.7."): tensor for key, tensor in tensors.items()}
    save_file(renamed, strange / "adapter_model.safetensors")
    with pytest.raises(StageError, match=r"7 part\(s\)") as refused:  # all seven modules of the layer are named
        merge_onto("original", base, strange, tmp_path / "out")
    assert "model.layers.7.self_attn.q_proj" in refused.value.problem.where


def test_dora_without_its_magnitudes_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    dora = shutil.copytree(adapter, tmp_path / "dora")
    config = json.loads((dora / "adapter_config.json").read_text()) | {"use_dora": True}
    (dora / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match="fit nothing") as refused:
        merge_onto("original", base, dora, tmp_path / "out")
    assert refused.value.problem.where.count("lacks DoRA's magnitudes") == 14
