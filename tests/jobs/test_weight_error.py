"""||W - NF4(W)|| / ||delta||: by hand, and on a real model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tasks.jobs.backends.load import load_bf16, load_nf4
from tasks.jobs.weight_error import error_over_delta, summary
from tests.tiny import write_base


def test_by_hand() -> None:
    original, dequantized = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert error_over_delta(original, dequantized, torch.tensor([[0.0, 2.0]])) == 2.5
    assert error_over_delta(original, original, torch.ones(1, 2)) == 0
    assert error_over_delta(original, dequantized, torch.zeros(1, 2)) == math.inf


def test_the_error_of_nf4_is_that_of_the_paper(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    bf16, nf4 = load_bf16(base, device="cpu"), load_nf4(base, device="cpu").dequantize()
    ratios = {}
    for name, layer in bf16.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = layer.weight.data
            ratios[name] = error_over_delta(weight, nf4.get_submodule(name).weight.data, weight)
    said = summary(ratios | {"left.out": math.inf})
    assert said is not None and (said["modules"], said["untouched"]) == (14, 1)
    # NF4 in blocks of 64 leaves 9 % of a normal weight's norm; delta is the weight itself here.
    assert said["median"] == pytest.approx(0.09, abs=0.01) and said["max"] < 0.11
    assert set(said["by_kind"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert said["max_module"] in ratios
    json.dumps(said, allow_nan=False)
    assert summary({"a": math.inf}) is None
