"""compressed-tensors files in transformers: unpacked at load into bf16 weights on their grid.

No kernel in transformers 5.23 reads the packed codes: left alone, the first forward would unpack them. Its
`dequantize=True` does not help: it reads every layer of a file by the first of its grids, and leaves KV scales out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils import patch_attr
from torch import Tensor
from transformers import PreTrainedModel


@contextlib.contextmanager
def packed_zero_points() -> Iterator[None]:
    """Models built meanwhile have place for zero points as the files hold them.

    transformers builds a model on the meta device, where compressed-tensors 0.20 packs the weight's shape and forgets
    the zero point's: [out, groups] int8 stays, the file has [out * bits / 32, groups] int32, and loading raises.
    """
    compress = PackedQuantizationCompressor.compress

    def with_zero_points(state: dict[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
        packed = compress(state, scheme)
        weights, zero = scheme.weights, packed.get("weight_zero_point")
        if weights is not None and not weights.symmetric and zero is not None and zero.device.type == "meta":
            words = -(-zero.shape[0] * weights.num_bits // 32)
            packed["weight_zero_point"] = torch.empty((words, zero.shape[1]), dtype=torch.int32, device="meta")
        return packed

    with patch_attr(PackedQuantizationCompressor, "compress", with_zero_points):
        yield


def unpack(model: PreTrainedModel) -> None:
    """Packed codes -> bf16 weights, one layer after the other: memory is that of the bf16 model in the end."""
    quantizer: Any = model.hf_quantizer
    quantizer.compressor.decompress_model(model)
