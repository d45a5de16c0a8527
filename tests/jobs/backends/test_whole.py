"""A vision-language base: its text decoder is quantized, its tower stays, and the result loads in its own class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from tasks.jobs.backends import gptqmodel
from tasks.jobs.backends.gptqmodel import name_what_is_left
from tasks.jobs.loading.load import load_arm, load_bf16
from tests.jobs.architectures import SHAPE
from tests.jobs.build import make_request
from tests.jobs.quantized import COST, log_probs, mean_kl, params
from tests.tiny import _tokenizer

ROWS = [torch.randint(4, 240, (96,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "base"
    tokenizer = _tokenizer(bos=False)
    tokenizer.save_pretrained(folder)
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = Gemma3TextConfig(**SHAPE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, bos_token_id=3)
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        image_token_index=250,
        boi_token_index=251,
        eoi_token_index=252,
    )
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_text_decoder_is_quantized_and_the_tower_stays(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = gptqmodel.quantize(make_request(base, out, rows=ROWS, params=params("gptq-w4-g32")))
    assert len(made.layers) == 14
    assert all(layer.name.startswith("language_model.model.layers.") for layer in made.layers)  # as in the checkpoint
    loaded, original = load_arm("quantized", out, device="cpu"), load_bf16(base, device="cpu")
    assert type(loaded) is type(original) is Gemma3ForConditionalGeneration
    assert 1e-7 < mean_kl(log_probs(original), log_probs(loaded)) < COST[4]
    before, after = original.state_dict(), loaded.state_dict()
    tower = [name for name in before if "vision" in name or "projector" in name]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    assert sum(name.endswith("qweight") for name in load_file(out / "model.safetensors")) == 14


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gptq", {"modules_in_block_to_quantize": [["mlp.up_proj", "self_attn.q_proj"]]}),
        ("awq", {"modules_to_not_convert": ["linear_attn.in_proj_a"]}),
    ],
)
def test_layers_that_are_left_are_named_for_the_loader(method: str, said: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "quantization_config": {"bits": 4}}\n')
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    made = {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"}
    name_what_is_left(tmp_path, left=set(), made=made, method=method)
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == {"bits": 4}
    name_what_is_left(tmp_path, left={"model.layers.0.linear_attn.in_proj_a"}, made=made, method=method)
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == {"bits": 4, **said}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"model_type": "x", "quantization_config": {"bits": 4, **said}}
