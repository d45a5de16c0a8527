"""Codes, scales and values are bitsandbytes' own, bit for bit: the real library says what is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from torch import Tensor

from tasks.jobs.loading.load import linear4bit, load_bf16, load_nf4
from tasks.jobs.merging.nf4 import Nf4, digests, quantize, row_step
from tasks.jobs.merging.nf4_blocks import AT_ONCE, quantize_blocks
from tests.tiny import write_base

BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all of its values
INF, NAN = float("inf"), float("nan")


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself and 0 is not -0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def assert_equal(weights: Tensor) -> None:
    """Codes, scales and, by single quantization, values."""
    right, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    codes, scales = quantize_blocks(weights)
    assert torch.equal(codes, right.view(-1))
    assert torch.equal(bits(scales), bits(state.absmax))


def drawn(shape: tuple[int, int]) -> Tensor:
    """Random weights of a usual size."""
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(4))).bfloat16()


def double(weights: Tensor) -> tuple[Tensor, Tensor, QuantState, Tensor]:
    """Codes, 8-bit scales, how to undo those, their mean: by bitsandbytes' double quantization."""
    codes, state = functional.quantize_4bit(weights, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert state.state2 is not None and state.offset is not None
    return codes, state.absmax, state.state2, state.offset


def below(largest: Tensor) -> Tensor:
    """Blocks [n, 64] that hold every value of bf16 up to this magnitude, and in each of them the value itself."""
    values = BF16[BF16.abs() <= largest.abs()]
    rest = -len(values) % 63
    values = torch.cat([values, values[:1].expand(rest)]).view(-1, 63)
    return torch.cat([values, largest.expand(len(values), 1)], dim=1)


@pytest.mark.parametrize("exponent", [0, 1, 2, 90, 127, 128, 253, 254])
def test_every_value_at_every_scale(exponent: int) -> None:
    """Exponents 0 are zero and the denormals, of 254 the reciprocal is denormal; others differ by a power of two."""
    for mantissa in range(128):
        largest = torch.tensor([exponent << 7 | mantissa], dtype=torch.int16).view(torch.bfloat16)
        assert_equal(below(-largest if mantissa % 2 else largest))


def test_all_values_in_a_row() -> None:
    """Inf and NaN in some blocks; NaN keeps its bits."""
    assert_equal(BF16)
    assert_equal(BF16[torch.randperm(len(BF16), generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_weights_of_any_length(dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(1)
    for count in (0, 1, 2, 63, 64, 65, 127, 128, 129, 4096 + 30, AT_ONCE, AT_ONCE + 64, 2 * AT_ONCE + 191):
        for scale in (1e-38, 1e-7, 0.02, 1.0, 1e4):
            assert_equal((scale * torch.randn(count, generator=draws)).to(dtype))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e-38, 1.2e-38, 3e38, INF, -INF, NAN])
@pytest.mark.parametrize("count", [10, 64, 138, 256])
def test_a_value_alone_and_among_others(value: float, count: int) -> None:
    weights = torch.randn(count, generator=torch.Generator().manual_seed(2))
    for place in (3, count - 1):
        weights[place] = value
        for dtype in (torch.bfloat16, torch.float32):
            assert_equal(weights.to(dtype))
            assert_equal(torch.full((count,), value, dtype=dtype))


def test_midpoints_and_their_neighbours() -> None:
    levels = functional.get_4bit_type("nf4", device="cpu")
    middle = (levels[:-1] + levels[1:]) / 2
    near = [middle.nextafter(torch.full_like(middle, towards)) for towards in (-INF, INF)]
    block = torch.cat([middle, *near, torch.ones(19)])
    for scale in (1.0, 0.02, 3.0, 7e-5):
        assert_equal(block * scale)


def test_the_weights_stay_as_they_were() -> None:
    weights = torch.randn(128, generator=torch.Generator().manual_seed(3))
    before = weights.clone()
    quantize_blocks(weights)
    assert torch.equal(weights, before)


def spans(shape: tuple[int, int]) -> Iterator[list[tuple[int, int]]]:
    """A matrix in parts of rows: small ones, larger ones, all at once."""
    step = row_step(shape[1])
    for rows in (step, 2 * step, shape[0]):
        yield [(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]


def in_parts(weights: Tensor, parts: list[tuple[int, int]], *, trained_on_cpu: bool) -> Nf4:
    rows = (weights[first:last] for first, last in parts)
    shape = weights.shape[0], weights.shape[1]
    return quantize(rows, shape, device="cpu", trained_on_cpu=trained_on_cpu)


@pytest.mark.parametrize("shape", [(256, 64), (96, 96), (64, 130), (7, 96), (9, 33), (1, 63)])
def test_doubly_quantized_in_parts_of_rows(shape: tuple[int, int]) -> None:
    """Blocks that cross rows, a last one that is short; whatever the size of the parts."""
    weights = drawn(shape)
    right = double(weights)
    for parts in spans(shape):
        made = in_parts(weights, parts, trained_on_cpu=False)
        assert digests(made.codes, made.scales, made.nested, made.offset) == digests(*right)


SHAPES = [(256, 64), (7, 192), (33, 320), (96, 96), (7, 96), (64, 130), (64, 160), (5, 48)]


@pytest.mark.parametrize("shape", SHAPES)
def test_doubly_dequantized_in_parts_of_rows(shape: tuple[int, int]) -> None:
    """On a CPU as bitsandbytes does there, elsewhere by the block that a weight is in: equal where rows are blocks."""
    weights = drawn(shape)
    codes, state = functional.quantize_4bit(weights, blocksize=64, compress_statistics=True, quant_type="nf4")
    there = functional.dequantize_4bit(codes, state)
    for parts in spans(shape):
        made = in_parts(weights, parts, trained_on_cpu=True)
        assert torch.equal(bits(torch.cat([made.rows(*part) for part in parts])), bits(there))
        made = in_parts(weights, parts, trained_on_cpu=False)
        right = torch.cat([made.rows(*part) for part in parts])
        assert torch.equal(bits(right), bits(by_hand(made)))
        assert shape[1] % 64 or torch.equal(bits(right), bits(there))


def by_hand(made: Nf4) -> Tensor:
    """A level times its block's scale, as bitsandbytes' general code and its kernels for GPUs do it; bf16 [out, in]."""
    indices = torch.stack([made.codes >> 4, made.codes & 15], dim=1).flatten().long()
    scales = made.absmax.repeat_interleave(64)[: len(indices)]
    return (functional.get_4bit_type("nf4", device="cpu")[indices] * scales).bfloat16().view(-1, made.columns)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_whole_models(architecture: Literal["llama", "qwen3"], tmp_path: Path) -> None:
    """What transformers and bitsandbytes make of a base when training loads it."""
    base = write_base(tmp_path, architecture=architecture)
    plain, trained = load_bf16(base, device="cpu"), linear4bit(load_nf4(base, device="cpu"))
    assert len(trained) == 14
    for name, layer in trained.items():
        module: Any = plain.get_submodule(name)
        weight: Tensor = module.weight.data
        state: Any = layer.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        made = in_parts(weight, [(0, len(weight))], trained_on_cpu=True)
        assert digests(made.codes, made.scales, made.nested, made.offset) == digests(
            layer.weight.data, state.absmax, state.state2, state.offset
        )
        right = functional.dequantize_4bit(layer.weight.data, state)
        assert torch.equal(bits(made.rows(0, len(weight))), bits(right))
