"""Where bitsandbytes gives weights the scales of other blocks on this CPU, the log says so; where it does not, not."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from tasks.jobs.loading.cpu_nf4 import ABOUT, note_other_scales

WIDTHS = (32, 64, 96, 130, 352)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_layer_is_named_where_its_weights_are_further_off_than_4_bits_make_them(width: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(128, width, dtype=torch.bfloat16)
    layer = Linear4bit(width, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.data = weights.clone()
    layer = layer.to("cpu")
    seen = layer(torch.eye(width, dtype=torch.bfloat16)).T  # what the layer multiplies by
    error = ((seen - weights).float().norm() / weights.float().norm()).item()
    told: dict[str, str] = {}
    note_other_scales(nn.Sequential(layer), told.__setitem__)
    assert (error > 0.12) == (ABOUT in told), error  # 4 bits of normal weights: 0.09; other scales: 0.19 to 0.40
    assert ABOUT not in told or f"width {width}" in told[ABOUT]
    assert width % 64 or not told
