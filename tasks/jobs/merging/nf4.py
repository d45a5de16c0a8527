"""NF4 as training has it: quantize and dequantize in parts of rows, and records of what was trained.

Blocks of 64 weights share a scale (absmax); the scales are quantized again, to 8 bits in blocks of 256, around their
mean (double quantization; Dettmers et al. 2023, arXiv:2305.14314, section 3). Both steps are bitsandbytes' own, but
for the codes on a CPU (`nf4_blocks`); only the 64-blocks are independent, so a tensor goes through in parts and its
scales go through at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from recipes.models.adapters import RECORD
from tasks.jobs.loading.cpu_nf4 import BLOCK, dequantize
from tasks.jobs.loading.load import linear4bit
from tasks.jobs.merging.nf4_blocks import quantize_blocks
from tasks.jobs.merging.streams import raw_bytes

NESTED = 256  # scales per second scale
SAMPLES = 64  # values per module in the record


def row_step(columns: int) -> int:
    """Least number of rows that holds whole blocks."""
    return BLOCK // math.gcd(columns, BLOCK)


class Nf4(NamedTuple):
    """One quantized weight [out, in].

    Attributes:
        codes: Packed 4-bit codes, two a byte, uint8 [numel / 2].
        scales: 8-bit codes of the scales, uint8 [numel / 64].
        nested: How to undo those.
        offset: Mean of the scales, fp32.
        absmax: The scales as dequantization sees them, fp32 [numel / 64].
        columns: in.
        as_on_cpu: All of it, bf16 [out, in], where a CPU may make other values of it than any other device.
    """

    codes: Tensor
    scales: Tensor
    nested: QuantState
    offset: Tensor
    absmax: Tensor
    columns: int
    as_on_cpu: Tensor | None

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first to last (exclusive), dequantized to bf16; `first` is a multiple of `row_step`."""
        if self.as_on_cpu is not None:
            return self.as_on_cpu[first:last]
        begin, end = first * self.columns, last * self.columns
        codes, absmax = self.codes[begin // 2 : -(-end // 2)], self.absmax[begin // BLOCK : -(-end // BLOCK)]
        flat = dequantize(codes.unsqueeze(1), absmax, (1, end - begin))
        return flat.view(-1, self.columns)


def quantize(parts: Iterable[Tensor], shape: tuple[int, int], *, device: str, trained_on_cpu: bool) -> Nf4:
    """bf16 rows [n, in] of a matrix, in parts of whole blocks (but for the last) -> what quantizing it at once gives.

    bitsandbytes 0.50.2's kernel for AVX-512 counts in // 64 blocks a row, whatever in % 64 is: it takes other scales
    where blocks cross rows. As one row a matrix has the right ones; training on a CPU had those of the matrix's shape.
    """
    numel = shape[0] * shape[1]
    codes = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(-(-numel // BLOCK), device=device)
    first = 0
    for part in parts:
        last = first + part.numel()
        codes[first // 2 : -(-last // 2)], scales[first // BLOCK : -(-last // BLOCK)] = quantize_blocks(part)
        first = last
    offset = scales.mean()
    nested_codes, nested = functional.quantize_blockwise(scales - offset, blocksize=NESTED)
    restored = functional.dequantize_blockwise(nested_codes, nested) + offset
    as_on_cpu = dequantize(codes.unsqueeze(1), restored, shape) if trained_on_cpu and shape[1] % BLOCK else None
    return Nf4(codes, nested_codes, nested, offset, restored, shape[1], as_on_cpu)


def sample_positions(numel: int) -> list[int]:
    """The places, in row-major order, whose dequantized values a record keeps: evenly spread."""
    return [index * numel // SAMPLES for index in range(SAMPLES)]


def digests(codes: Tensor, scales: Tensor, nested: QuantState, offset: Tensor) -> dict[str, str]:
    """sha256 of the packed codes and of everything that makes the scales."""
    return {
        "codes": _sha256(codes),
        "scales": _sha256(scales, nested.absmax, offset.reshape(1)),
    }


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def write_record(model: nn.Module, folder: Path) -> None:
    """nf4.json: what every 4-bit module of the model is now, by its name in the base.

    A merge on another machine or device quantizes the base again; the record tells whether that gives the same.
    """
    modules: dict[str, Any] = {}
    for name, layer in linear4bit(model).items():
        state: Any = layer.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        modules[module_name(name)] = {
            **digests(layer.weight.data, state.absmax, state.state2, state.offset),
            "values": sampled(layer).float().tolist(),
        }
    device = next(model.parameters()).device.type
    record = {"bitsandbytes": bitsandbytes.__version__, "device": device, "modules": modules}
    (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def sampled(layer: Linear4bit) -> Tensor:
    """A 4-bit layer's dequantized values at `sample_positions`, on the CPU."""
    state: Any = layer.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
    dequantized = functional.dequantize_4bit(layer.weight.data, state).flatten()
    return dequantized[torch.tensor(sample_positions(dequantized.numel()), device=dequantized.device)].cpu()


def module_name(name: str) -> str:
    """A module's name in the base, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance of two bf16 tensors, in steps between neighbouring bf16 values."""

    def order(tensor: Tensor) -> Tensor:
        bits = tensor.to(torch.bfloat16).view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((order(a) - order(b)).abs().max())
