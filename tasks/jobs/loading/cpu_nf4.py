"""A fault of bitsandbytes on CPUs with AVX-512: weights that get the scales of other blocks.

bitsandbytes 0.50.2's kernel for dequantizing there counts in // 64 blocks a row. Where a layer's width is no multiple
of 64, blocks cross rows, and the kernel takes other scales: errors of 0.19 to 0.40 of the weights where 4 bits make
0.09 (widths 32, 48, 96, 160, 352; 130 is right). Training and evaluation on such a CPU see the same weights, a GPU
sees others. Nobody mends that here; whoever looks at the figures is told.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tasks.jobs.loading.kernels import Note

BLOCK = 64  # weights per scale; QLoRA's and bitsandbytes' default
ABOUT = "nf4 on this cpu"


def note_other_scales(model: nn.Module, note: Note) -> None:
    """Say which NF4 layers have wrong weights on this CPU.

    Args:
        model: Loaded.
        note: Is called where there are any.
    """
    widths = sorted(set(_other_scales(model)))
    if widths:
        note(
            ABOUT,
            f"bitsandbytes gives layers of width {', '.join(map(str, widths))} (no multiple of {BLOCK}) the scales of "
            "other blocks: their weights are further off than 4 bits make them. A GPU has the right ones",
        )


def _other_scales(model: nn.Module) -> Iterator[int]:
    from bitsandbytes.nn.modules import Linear4bit  # slow to import, and most arms have none

    for module in model.modules():
        if (
            isinstance(module, Linear4bit)
            and module.weight.device.type == "cpu"
            and not has_own_scales(module.in_features)
        ):
            yield module.in_features


@functools.cache
def has_own_scales(width: int) -> bool:
    """True where a matrix of this width is dequantized like the same weights in one row, which has its own scales."""
    from bitsandbytes import functional

    if width % BLOCK == 0:
        return True
    weights = torch.linspace(-1, 1, BLOCK * width, dtype=torch.bfloat16).view(BLOCK, width)
    codes, state = functional.quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4")
    whole, one_row = (dequantize(codes, state.absmax, shape) for shape in ((BLOCK, width), (1, weights.numel())))
    return torch.equal(whole.flatten(), one_row.flatten())


def dequantize(codes: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
    """By bitsandbytes, to bf16.

    Args:
        codes: uint8 [numel / 2, 1], two weights each.
        absmax: fp32, one a block.
        shape: [out, in].
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(absmax=absmax, shape=torch.Size(shape), dtype=torch.bfloat16, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(codes, state)
