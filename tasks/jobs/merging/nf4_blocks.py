"""bitsandbytes' NF4 codes on a CPU, by fifteen comparisons a weight in place of a search.

bitsandbytes 0.50.2 (pinned) has no kernel for this step on a CPU. It takes its general one (quantize_4bit in
bitsandbytes/backends/default/ops.py): weights in fp32, times the reciprocal of their block's largest magnitude, then
torch.bucketize into the midpoints of the 16 levels, about 30 ns a weight. Here scaling is the same operations of torch
on the same numbers, and the search is counting the midpoints below a weight, which is exact: codes and scales are
equal bit for bit. What is not like that stays with bitsandbytes itself: other devices than the CPU, a last block that
is short (it divides there), and a part that holds inf or NaN.
"""

from __future__ import annotations

import numpy as np
import torch
from bitsandbytes import functional
from numpy.typing import NDArray
from torch import Tensor

from tasks.jobs.loading.cpu_nf4 import BLOCK

LEAST = 1e-38  # what bitsandbytes takes for a largest magnitude that is below it
AT_ONCE = 1 << 15  # weights that are compared at once: half a MiB with what comes out, which stays in the cache

_LEVELS = functional.get_4bit_type("nf4", device="cpu")
_MIDPOINTS = ((_LEVELS[:-1] + _LEVELS[1:]) / 2).unsqueeze(1).numpy()  # fp32 [15, 1]


def quantize_blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, in blocks of 64 in row-major order -> exactly what functional.quantize_4bit makes of them.

    Args:
        weights: bf16, fp16 or fp32, of any shape, on any device.

    Returns:
        Codes, two a byte, the first in its upper half, uint8 [numel / 2, rounded up]; the blocks' largest magnitudes,
        fp32 [numel / 64, rounded up].
    """
    flat = weights.reshape(-1)
    if flat.device.type != "cpu":
        return _by_bitsandbytes(flat)
    whole = flat.numel() // BLOCK * BLOCK
    blocks = flat[:whole].to(torch.float32, copy=True).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    if not scales.isfinite().all():
        return _by_bitsandbytes(flat)
    blocks *= (1.0 / scales.clamp(min=LEAST)).unsqueeze(1)
    codes = torch.from_numpy(_codes(blocks.view(-1).numpy()))
    if whole < flat.numel():
        last_codes, last_scale = _by_bitsandbytes(flat[whole:])
        return torch.cat([codes, last_codes]), torch.cat([scales, last_scale])
    return codes, scales


def _by_bitsandbytes(flat: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
    return codes.view(-1), state.absmax


def _codes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scaled weights [n], n even -> packed codes [n / 2]."""
    codes = np.empty(len(scaled) // 2, np.uint8)
    for first in range(0, len(scaled), AT_ONCE):
        last = first + AT_ONCE
        below = np.greater(scaled[first:last], _MIDPOINTS).view(np.uint8).sum(0, dtype=np.uint8)
        pairs = below.view("<u2")  # the first of a pair is the lower byte, and goes into the upper half
        codes[first // 2 : last // 2] = pairs << 4 | pairs >> 8
    return codes
