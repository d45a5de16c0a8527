"""||W - NF4(W)|| / ||delta||: by hand, and on a real model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tasks.jobs.loading.load import load_bf16, load_nf4
from tasks.jobs.merging.weight_error import Norms, summary
from tests.tiny import write_base


def test_by_hand_and_part_by_part() -> None:
    norms = Norms()
    row, other, delta = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    norms.add("one", original=row, dequantized=other, merged=other + delta)
    assert (row.tolist(), other.tolist(), delta.tolist()) == ([[3.0, 0.0]], [[0.0, 4.0]], [[0.0, 2.0]])
    norms.add("none", original=row, dequantized=other, merged=other)
    for _ in range(2):
        norms.add("two", original=row, dequantized=other, merged=other + delta)
    assert norms.ratios == {"one": 2.5, "none": math.inf, "two": pytest.approx(2.5)}


def test_the_error_of_nf4_is_that_of_the_paper(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    bf16, nf4 = load_bf16(base, device="cpu"), load_nf4(base, device="cpu").dequantize()
    norms = Norms()
    for name, layer in bf16.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = layer.weight.data
            rounded = nf4.get_submodule(name).weight.data
            norms.add(name, original=weight, dequantized=rounded, merged=rounded.float() + weight.float())
    ratios = summary(norms.ratios | {"left.out": math.inf})
    assert ratios is not None and (ratios["modules"], ratios["untouched"]) == (14, 1)
    # NF4 in blocks of 64 leaves 9 % of a normal weight's norm; delta is the weight itself here.
    assert ratios["median"] == pytest.approx(0.09, abs=0.01) and ratios["max"] < 0.11
    assert set(ratios["by_kind"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert ratios["max_module"] in norms.ratios
    json.dumps(ratios, allow_nan=False)
    assert summary({"a": math.inf}) is None
