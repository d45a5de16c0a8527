"""Codes are read from the bytes of a file as each format packs them, whatever their bits; padding is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from recipes.models.weights import Tensor, read_file
from recipes.schemes import codes
from recipes.schemes.codes import codes_used
from tests.jobs.backends.test_rtn import published_packing

WIDE, TALL = 96, 40


def stored(folder: Path, name: str, tensor: torch.Tensor) -> Tensor:
    save_file({name: tensor.contiguous()}, folder / "model.safetensors")
    return read_file(folder / "model.safetensors")[name]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("inputs", [96, 40, 104])  # 96 fills whole words at any bits; 40 and 104 leave padding
def test_compressed_tensors_packs_and_these_are_its_codes(bits: int, inputs: int, tmp_path: Path) -> None:
    """Codes from 1 on: the zeros of the padding would show."""
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(1, 2**bits - 1, (TALL, inputs), generator=generator)  # without the first and the last
    packed = pack_to_int32((values - 2 ** (bits - 1)).to(torch.int8), bits)
    tensor = stored(tmp_path, "a.weight_packed", packed)
    assert codes_used(tensor, bits, inputs=inputs, levels=2**bits) == set(values.flatten().tolist())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_packs_down_the_inputs(bits: int, tmp_path: Path) -> None:
    few = torch.tensor([0, 1, 2**bits - 2])  # in random order: what is read across two words shows
    values = few[torch.randint(0, 3, (WIDE, TALL), generator=torch.Generator().manual_seed(0))]
    words = published_packing(values, bits).numpy().astype(np.uint32).view(np.int32)
    tensor = stored(tmp_path, "a.qweight", torch.from_numpy(words))
    assert codes_used(tensor, bits, inputs=WIDE, levels=2**bits) == set(few.tolist())


def test_signed_codes(tmp_path: Path) -> None:
    values = torch.randint(-100, 101, (64, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    tensor = stored(tmp_path, "a.weight", values)
    assert codes_used(tensor, 8, inputs=64, levels=255, signed=True) == set(values.flatten().tolist())


def test_it_stops_where_every_level_was_seen_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one code that is missing in front stands in the last byte."""
    monkeypatch.setattr(codes, "CHUNK", 16)
    nibbles = torch.randint(0, 15, (4096, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    tensor = stored(tmp_path, "a.weight", nibbles[:, 0] << 4 | nibbles[:, 1])
    assert codes_used(tensor, 4, inputs=128, levels=16) == set(range(15))
    nibbles[-1] = 15
    tensor = stored(tmp_path, "a.weight", nibbles[:, 0] << 4 | nibbles[:, 1])
    assert codes_used(tensor, 4, inputs=128, levels=16) == set(range(16))
