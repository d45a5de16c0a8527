"""Adapters whose modules have the names of another class or version of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Mistral3Config,
    PreTrainedConfig,
    Qwen3VLConfig,
)

from tasks.jobs import merge
from tasks.jobs.loading.attach import attach
from tests.jobs.architectures import tokens
from tests.jobs.build import make_job

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "vocab_size": 320,
    "initializer_range": 0.04,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TARGETS = ["q_proj", "v_proj", "up_proj"]


def gemma3() -> PreTrainedConfig:
    return Gemma3Config(text_config=TEXT | {"sliding_window": 16}, vision_config=VISION, mm_tokens_per_image=4)


def mistral3() -> PreTrainedConfig:
    text, vision = TEXT | {"model_type": "mistral"}, VISION | {"model_type": "pixtral", "head_dim": 16}
    return Mistral3Config(text_config=text, vision_config=vision)


def qwen3_vl() -> PreTrainedConfig:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    vision |= {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14, "deepstack_visual_indexes": [0]}
    numbers = {name: 310 + place for place, name in enumerate(ids)}
    return Qwen3VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **numbers)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {"gemma3": gemma3, "mistral3": mistral3, "qwen3-vl": qwen3_vl}
HERE = "base_model.model.model.language_model."
OLDER = {
    "until 4.51": "base_model.model.language_model.model.",
    "with two wrappers": "base_model.model.model.language_model.model.",
    "text decoder alone": "base_model.model.model.",
}


def write_whole(folder: Path, name: str) -> Path:
    """A base with a vision tower, as its own save_pretrained writes it (with the names of its releases)."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[name]())
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, *, targets: Any = None) -> Path:
    """A LoRA with random A and B on the text decoder of the whole model, by the names of this version."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    pattern = rf".*language_model.*\.({'|'.join(TARGETS)})"
    lora = LoraConfig(r=4, target_modules=pattern, init_lora_weights=False, alpha_pattern={r"layers\.1.*": 3})
    get_peft_model(model, lora).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config | ({"target_modules": targets} if targets else {})))
    return folder


def renamed(adapter: Path, folder: Path, prefix: str, *, targets: Any) -> Path:
    """The same adapter as another version wrote it."""
    folder.mkdir()
    tensors = {name.replace(HERE, prefix): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}
    assert all(name.startswith(prefix) for name in tensors) and len(tensors) == 2 * 2 * len(TARGETS)
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


WEIGHTS = "adapter_model.safetensors"


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    job = make_job("merge", out, params={"onto": "original"}, base=base, adapter=adapter)
    assert merge.run(job)["by"] == "stream"
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_older_names_merge_into_the_same_weights(name: str, tmp_path: Path) -> None:
    base = write_whole(tmp_path / "base", name)
    adapter = write_adapter(tmp_path / "adapter", base)
    expected, stored = merged(base, adapter, tmp_path / "here"), load_file(base / "model.safetensors")
    assert expected.keys() == stored.keys()
    changed = {key for key, tensor in stored.items() if not torch.equal(tensor, expected[key])}
    assert len(changed) == 2 * len(TARGETS) and all("language_model" in key for key in changed)
    for version, prefix in OLDER.items():
        older = renamed(adapter, tmp_path / version, prefix, targets=TARGETS)
        actual = merged(base, older, tmp_path / f"out {version}")
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items()), version


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize("targets", ["list", "pattern"])
def test_evaluation_of_base_and_adapter_reads_older_names(version: str, targets: str, tmp_path: Path) -> None:
    """PEFT alone would take the tower's q_proj for a target, and the names of the decoder alone for nothing."""
    base = write_whole(tmp_path / "base", "gemma3")
    adapter = write_adapter(tmp_path / "adapter", base)
    own = TARGETS if targets == "list" else rf"{OLDER[version].split('.', 2)[2]}.*\.({'|'.join(TARGETS)})"
    older = renamed(adapter, tmp_path / "older", OLDER[version], targets=own)

    def logits(folder: Path) -> torch.Tensor:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
        with torch.no_grad():
            return attach(model, folder)(tokens(2)).logits

    assert torch.equal(logits(older), logits(adapter))
    bare = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    assert not torch.equal(bare(tokens(2)).logits, logits(adapter))
