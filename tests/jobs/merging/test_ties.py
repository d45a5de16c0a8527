"""Embeddings and output layer: what config.json and the files say of them is what transformers evaluates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.jobs import merge
from tasks.jobs.loading.load import load_arm
from tests.jobs.architectures import MOE_TARGETS, train_adapter, write_architecture
from tests.jobs.build import make_job, notes
from tests.jobs.merging.test_architectures import log_probs
from tests.jobs.quantized import mean_kl
from tests.jobs.test_merge import FAITHFUL

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def write_two(folder: Path, *, equal: bool) -> Path:
    """A base whose config.json ties embeddings and output layer, and whose file holds both."""
    base = write_architecture(folder, "llama", tied=True)
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors[TABLE].clone()
    if not equal:
        tensors[HEAD] += 0.01 * torch.randn(tensors[HEAD].shape).to(torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("lora", "one_side"),
    [
        ({}, False),
        ({"target_modules": [*MOE_TARGETS, "lm_head"]}, True),
        ({"target_modules": [*MOE_TARGETS, "embed_tokens"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
    ],
)
def test_two_matrices_under_one_name(tmp_path: Path, equal: bool, lora: dict[str, Any], one_side: bool) -> None:
    base = write_two(tmp_path / "base", equal=equal)
    adapter = train_adapter(base, tmp_path / "adapter", **lora)
    job = make_job("merge", tmp_path / "out", params={"onto": "dequantized"}, base=base, adapter=adapter)
    merge.run(job)
    plain = AutoModelForCausalLM.from_pretrained(job.out).eval()
    trained = log_probs(load_arm("nf4", base, adapter=adapter, device="cpu"))
    assert mean_kl(trained, log_probs(plain)) < FAITHFUL
    tied = equal and not one_side
    stored = {name for path in job.out.glob("*.safetensors") for name in load_file(path)}
    assert (HEAD in stored) is not tied
    assert json.loads((job.out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("two that differ" in notes(job).get("embeddings", "")) is not equal


def test_equal_copies_that_config_calls_two_stay_two(tmp_path: Path) -> None:
    base = write_two(tmp_path / "base", equal=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=MOE_TARGETS)
    job = make_job("merge", tmp_path / "out", params={"onto": "original"}, base=base, adapter=adapter)
    merge.run(job)
    assert HEAD in load_file(job.out / "model.safetensors")
    assert json.loads((job.out / "config.json").read_text())["tie_word_embeddings"] is False
