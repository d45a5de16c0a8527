"""Round-to-nearest in plain torch, symmetric, one scale a group or an output: what other schemes are compared with.

Written in GPTQ's v1 packing, so that whatever loads GPTQ loads it. Reads and writes one shard at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.models.headers import read_headers
from recipes.schemes.scheme import PER_CHANNEL
from tasks.jobs.backends import LayerRecord, Quantized, Request, relative_error
from tasks.jobs.backends.rewrite import rewrite, write_configs

VERSION = 1


class Rounded(NamedTuple):
    """A weight on its grid: w = (code - zero) * scale.

    Attributes:
        codes: [out, in] uint8, 0 to 2^bits - 1.
        scales: [out, groups] fp16, as stored.
        zero: The code of 0: 2^(bits - 1).
    """

    codes: Tensor
    scales: Tensor
    zero: int

    def dequantized(self) -> Tensor:
        """[out, in] fp32."""
        rows, groups = self.scales.shape
        codes = self.codes.view(rows, groups, -1).float() - self.zero
        return (codes * self.scales.float().unsqueeze(-1)).view(rows, -1)


def round_to_nearest(weight: Tensor, *, bits: int, group_size: int) -> Rounded:
    """Round to nearest on the grid that GPTQ's symmetric quantizer uses: scale = 2 max|w| / (2^bits - 1).

    The scale is rounded to fp16 first, and weights are rounded on the grid that the file will hold.

    Args:
        weight: [out, in]; group_size divides in.
        bits: 2 to 8.
        group_size: Inputs a scale; -1: all of an output.
    """
    groups = weight.float().view(len(weight), -1, _inputs(weight, group_size))
    top = 2**bits - 1
    zero = 2 ** (bits - 1)
    scales = (2 * groups.abs().amax(-1) / top).half()
    scales[scales == 0] = 1  # a group of zeros (or below 6e-8, fp16's smallest): any scale gives zeros
    codes = (groups / scales.float().unsqueeze(-1)).round() + zero
    return Rounded(codes.clamp(0, top).to(torch.uint8).view(weight.shape), scales, zero)


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Codes as a stream of bits, low bits first, cut into int32: GPTQ's packing for 2, 3, 4 and 8 bits.

    Args:
        codes: [rows, n] uint8; n * bits is a multiple of 32.
        bits: Bits a code.

    Returns:
        [rows, n * bits / 32] int32.
    """
    stream = np.unpackbits(codes.numpy()[..., None], axis=-1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<i4"))


def packed(rounded: Rounded, *, bits: int) -> dict[str, Tensor]:
    """A weight [out, in] on its grid as the four tensors of a GPTQ v1 layer; v1 stores zero points less one."""
    inputs = rounded.codes.shape[1]
    rows, groups = rounded.scales.shape
    zeros = torch.full((groups, rows), rounded.zero - 1, dtype=torch.uint8)
    return {
        "qweight": pack(rounded.codes, bits=bits).t().contiguous(),  # [in * bits / 32, out]
        "qzeros": pack(zeros, bits=bits),  # [groups, out * bits / 32]
        "scales": rounded.scales.t().contiguous(),  # [groups, out]
        "g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def _inputs(weight: Tensor, group_size: int) -> int:
    """Inputs that share a scale."""
    return weight.shape[1] if group_size == PER_CHANNEL else group_size


def quantize(request: Request) -> Quantized:
    """Quantize every linear layer inside the decoder layers; everything else is copied. Always on the CPU."""
    model, params = request.model, request.params
    layers = {f"{layer.name}.weight": layer for layer in read_headers(model).linears}
    errors: dict[str, float] = {}

    def change(name: str, weight: Tensor) -> dict[str, Tensor]:
        if name not in layers:
            return {name: weight}
        rounded = round_to_nearest(weight, bits=params["bits"], group_size=params["group_size"])
        stem = layers[name].name
        errors[stem] = relative_error(weight, rounded.dequantized())
        request.events.progress(len(errors), len(layers), unit="layer")
        return {f"{stem}.{part}": value for part, value in packed(rounded, bits=params["bits"]).items()}

    rewrite(model, request.out, change)
    write_configs(model, request.out, quantization=_quantization(params))
    records = [LayerRecord(name=layer.name, weight_error=errors[layer.name]) for layer in layers.values()]
    return Quantized(backend=f"quench-rtn:{VERSION}", packer="numpy", layers=records)


def _quantization(params: dict[str, Any]) -> dict[str, Any]:
    """quantization_config that transformers, AutoGPTQ and vLLM read."""
    return {
        "bits": params["bits"],
        "group_size": params["group_size"],
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"quench-rtn:{VERSION}"]},
    }
