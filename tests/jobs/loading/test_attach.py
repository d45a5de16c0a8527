"""An adapter whose file and model do not fit each other is refused, where PEFT warns and goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tasks.jobs.loading.attach import attach
from tasks.jobs.loading.load import load_bf16
from tasks.runtime.process.errors import StageError
from tests.jobs.architectures import tokens, write_architecture

Tensors = dict[str, torch.Tensor]
MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("base"), "llama")


def write(folder: Path, base: Path, **lora: Any) -> Path:
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | lora
    get_peft_model(load_bf16(base, device="cpu"), LoraConfig(**config)).save_pretrained(folder)
    return folder


def logits(base: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return attach(load_bf16(base, device="cpu"), folder)(tokens(2)).logits


def stray(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(4, 128)


def half(tensors: Tensors) -> None:
    del tensors[f"{MODULE}.lora_B.weight"]


def none_of(tensors: Tensors) -> None:
    for part in ("lora_A", "lora_B"):
        del tensors[f"{MODULE}.{part}.weight"]


def wide(tensors: Tensors) -> None:
    tensors[f"{MODULE}.lora_A.weight"] = torch.ones(4, 64)


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        (stray, "does not fit", "layers.9.mlp.up_proj"),
        (half, "not in its file", "layers.1.self_attn.q_proj.lora_B"),
        (none_of, "not in its file", "layers.1.self_attn.q_proj"),
        (wide, "does not fit", "size mismatch"),
    ],
)
def test_parts_that_fit_nothing_and_parts_that_are_missing(
    base: Path, tmp_path: Path, change: Callable[[Tensors], None], what: str, where: str
) -> None:
    adapter = write(tmp_path / "adapter", base)
    attach(load_bf16(base, device="cpu"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StageError, match=what) as refused:
        attach(load_bf16(base, device="cpu"), adapter)
    assert where in refused.value.problem.where


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.mlp.up_proj"]},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 3}, "use_rslora": True},
        {"trainable_token_indices": [5, 7]},
        {"target_modules": "all-linear"},
    ],
)
def test_a_checkpoint_of_other_names_gives_the_same_model(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """An adapter that names modules as the decoder of a vision-language model has them."""
    adapter = write(tmp_path / "adapter", base, **settings)
    tensors = load_file(adapter / "adapter_model.safetensors")
    if "trainable_token_indices" in settings:
        key = next(key for key in tensors if "token_adapter" in key)
        tensors[key] = torch.randn(tensors[key].shape)
        save_file(tensors, adapter / "adapter_model.safetensors")
    expected = logits(base, adapter)
    wrapped = "base_model.model.model.language_model."
    older = {key.replace("base_model.model.model.", wrapped): tensor for key, tensor in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, adapter / "adapter_model.safetensors")
    assert torch.equal(logits(base, adapter), expected)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    assert not torch.equal(logits(base, adapter), expected)
