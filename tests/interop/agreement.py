"""Compares what two readers make of one quantized model, and what the file format means by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

# Equal weights in kernels of plain torch gave equal logits: 0 nats. Rounding a model to 4 bits costs 5e-4, one zero
# point that is off by one 1.4e-5, two groups that change places 1.3e-3: bits notice all, KL all but the zero point.
KL_LIMIT, TOP1_LIMIT = 1e-4, 0.999
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the gemm layout puts the n-th of eight outputs


class Agreement(NamedTuple):
    """A writer's model against the same one as another reader understands it.

    Attributes:
        layers: Quantized layers.
        unequal: Those whose dequantized weights differ in any bit.
        kl: Mean of KL(writer || reader) over all tokens, nats.
        worst_kl: Largest of one token.
        top1: Share of tokens whose likeliest next token is the same.
        tokens: Tokens.
    """

    layers: int
    unequal: tuple[str, ...]
    kl: float
    worst_kl: float
    top1: float
    tokens: int

    @property
    def holds(self) -> bool:
        """All of it: bits, KL and top-1."""
        return not self.unequal and self.kl < KL_LIMIT and self.top1 >= TOP1_LIMIT


def compare(writer: Path, reader: Path) -> Agreement:
    """Compare two outputs of tests.interop.readers for one model."""
    ours, theirs = load_file(writer / "weights.safetensors"), load_file(reader / "weights.safetensors")
    assert ours and ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    p = _log_probs(writer / "logits.safetensors")
    q = _log_probs(reader / "logits.safetensors")
    kl = (p.exp() * (p - q)).sum(-1)
    return Agreement(
        layers=len(ours),
        unequal=tuple(name for name, weight in ours.items() if not torch.equal(weight, theirs[name])),
        kl=kl.mean().item(),
        worst_kl=kl.max().item(),
        top1=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        tokens=len(p),
    )


def _log_probs(path: Path) -> Tensor:
    rows = load_file(path)
    return torch.cat([rows[str(i)] for i in range(len(rows))]).double().log_softmax(-1)


def off_definition(folder: Path, weights: Path) -> list[str]:
    """Layers whose weights, as a reader gave them, are not what the files mean, rounded once to fp16."""
    tensors, config, names = _quantized(folder)
    read = load_file(weights)
    assert names and set(names) == read.keys(), set(names) ^ read.keys()
    meant = awq_weight if config["quant_method"] == "awq" else gptq_weight
    return [name for name in names if not torch.equal(meant(tensors, name, config), read[name])]


def off_layout(folder: Path, layout: Callable[[dict[str, Tensor], str], Tensor]) -> list[str]:
    """Layers that an engine's arithmetic would read otherwise than the files mean."""
    tensors, config, names = _quantized(folder)
    meant = awq_weight if config["quant_method"] == "awq" else gptq_weight
    return [name for name in names if not torch.equal(meant(tensors, name, config), layout(tensors, name))]


def _quantized(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return tensors, config, sorted(key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight"))


def gptq_weight(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    """[in, out] fp16: GPTQ v1 packs along the inputs, stores zero points less one, and names each input's group."""
    packed, zeros, scales, group = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    bits = config["bits"]
    zero = (codes(zeros, bits) + 1) % 2**bits
    return _dequantized(codes(packed.t(), bits).t(), zero, scales, group.long())


def awq_weight(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    """[in, out] fp16: AWQ's gemm layout packs along the outputs, in an order of its own, zero points as they are."""
    packed, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    weight, zero = (codes(one, 4).view(len(one), -1, 8)[..., AWQ_ORDER].flatten(1) for one in (packed, zeros))
    return _dequantized(weight, zero, scales, torch.arange(len(weight)) // config["group_size"])


def _dequantized(weight: Tensor, zero: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """An integer of 9 bits times an fp16 scale is exact in fp32: rounded once."""
    return ((weight - zero[group]).float() * scales.float()[group]).half()


def codes(packed: Tensor, bits: int) -> Tensor:
    """[rows, n] int32: undo the packing along the last dimension, a stream of bits, low ones first."""
    stream = np.unpackbits(packed.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    unpacked = np.packbits(stream.reshape(len(packed), -1, bits), axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(unpacked.astype(np.int32))


# ---- engines that do not run here, by the arithmetic of their sources


def exllamav2(tensors: dict[str, Tensor], name: str) -> Tensor:
    """[in, out] fp16, 4-bit GPTQ: exllamav2_ext/cuda/q_matrix.cu, reconstruct_gptq_kernel.

    It adds 1 to a stored zero point without wrapping, and takes a power of two as the group's size.
    """
    packed, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    k, n = torch.arange(8 * len(packed)), torch.arange(packed.shape[1])
    size = 1
    while size * len(scales) < len(k):
        size *= 2
    code = packed[k // 8] >> (4 * (k % 8))[:, None] & 15
    zero = (zeros[:, n // 8] >> 4 * (n % 8) & 15) + 1
    return _dequantized(code, zero, scales, k // size)


def vllm_gptq(tensors: dict[str, Tensor], name: str) -> Tensor:
    """[in, out] fp16, symmetric 4-bit GPTQ in vLLM (auto_gptq.py, type uint4b8): stored zero points are not read."""
    packed, scales, group = (tensors[f"{name}.{part}"] for part in ("qweight", "scales", "g_idx"))
    k = torch.arange(8 * len(packed))
    code = packed[k // 8] >> (4 * (k % 8))[:, None] & 15
    return _dequantized(code, torch.full_like(scales, 8).int(), scales, group.long())


def vllm_awq(tensors: dict[str, Tensor], name: str) -> Tensor:
    """[in, out] fp16, AWQ in vLLM (awq_triton.py, awq_dequantize_kernel)."""
    packed, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    n = torch.arange(scales.shape[1])
    shift = 4 * (n % 8 // 2 + n % 2 * 4)
    group = torch.arange(len(packed)) // (len(packed) // len(scales))
    return _dequantized(packed[:, n // 8] >> shift & 15, zeros[:, n // 8] >> shift & 15, scales, group)
