"""Our round-to-nearest: on its grid, in GPTQ's packing, and read back bit for bit by another's kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTQConfig

from recipes.schemes.slugs import parse_scheme
from tasks.jobs import quantize
from tasks.jobs.backends.quench_rtn import pack, round_to_nearest
from tasks.jobs.loading.environment import tame_gptqmodel
from tests.jobs.build import make_job
from tests.tiny import write_base

BITS = (2, 3, 4, 8)


def rtn(base: Path, out: Path, *, bits: int, group_size: int = 32) -> Path:
    params = parse_scheme(f"rtn-w{bits}-g{group_size}").params() | {"seed": 0}
    quantize.run(make_job("quantize", out, params=params, model=base))
    return out


def published_packing(codes: Tensor, bits: int) -> Tensor:
    """GPTQ's own loops (github.com/IST-DASLab/gptq, quant.py), packing along the first dimension."""
    words = torch.zeros(codes.shape[0] * bits // 32, codes.shape[1], dtype=torch.int64)
    codes = codes.long()
    i = row = 0
    while row < len(words):
        if bits in (2, 4, 8):
            for j in range(32 // bits):
                words[row] |= codes[i + j] << (bits * j)
            i, row = i + 32 // bits, row + 1
            continue
        for j in range(10):
            words[row] |= codes[i + j] << (3 * j)
        words[row] |= codes[i + 10] << 30
        words[row + 1] |= (codes[i + 10] >> 2) & 1
        for j in range(10):
            words[row + 1] |= codes[i + 11 + j] << (3 * j + 1)
        words[row + 1] |= codes[i + 21] << 31
        words[row + 2] |= (codes[i + 21] >> 1) & 3
        for j in range(10):
            words[row + 2] |= codes[i + 22 + j] << (3 * j + 2)
        i, row = i + 32, row + 3
    return words.bitwise_and(0xFFFFFFFF)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_the_published_one(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (96, 8), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    mine = pack(codes.t().contiguous(), bits=bits).t().long().bitwise_and(0xFFFFFFFF)
    assert torch.equal(mine, published_packing(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_every_weight_is_on_the_nearest_point_of_its_grid(bits: int) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = round_to_nearest(weight, bits=bits, group_size=32)
    scales = rounded.scales.float().repeat_interleave(32, dim=1)
    grid = (torch.arange(2**bits) - 2 ** (bits - 1)) * scales.unsqueeze(-1)
    least = (grid - weight.float().unsqueeze(-1)).abs().amin(-1)
    assert torch.equal((rounded.dequantized() - weight.float()).abs(), least)
    # The grid ends at 2^(b-1) - 1 steps and the largest weight lies at 2^(b-1) - 0.5: half a step off, as any other,
    # but for the scale's rounding to fp16 (2^-11).
    assert bool((least <= scales * (0.5 + 2 ** (bits - 1) * 2**-11)).all())


def test_a_group_of_zeros_stays_zero() -> None:
    rounded = round_to_nearest(torch.zeros(4, 32), bits=4, group_size=32)
    assert torch.equal(rounded.dequantized(), torch.zeros(4, 32))


@pytest.mark.parametrize("bits", BITS)
def test_transformers_reads_back_our_formula_bit_for_bit(bits: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    out = rtn(base, tmp_path / "out", bits=bits)
    tame_gptqmodel()
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float16, quantization_config=GPTQConfig(bits=bits, backend="gptq_torch")
    ).eval()
    original = load_file(base / "model.safetensors")
    compared = 0
    for name, weight in original.items():
        if ".layers." not in name or weight.dim() != 2:
            continue
        layer = model.get_submodule(name.removesuffix(".weight"))
        ours = round_to_nearest(weight, bits=bits, group_size=32).dequantized()
        assert torch.equal(layer.dequantize_weight().t(), ours.half()), name
        compared += 1
    assert compared == 14  # seven linear layers in each of two decoder layers


def test_it_agrees_with_gptqmodels_own_round_to_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it makes a folder logs/ where it runs
    base = write_base(tmp_path / "base")
    tame_gptqmodel()
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import RTNConfig

    theirs = GPTQModel.load(str(base), RTNConfig(bits=4, group_size=32, offload_to_disk=False), device="cpu")
    theirs.quantize(None)
    theirs.save(str(tmp_path / "theirs"))
    a = load_file(rtn(base, tmp_path / "ours", bits=4) / "model.safetensors")
    b = load_file(tmp_path / "theirs" / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("qweight"):
            # They round on the fp32 scale, where the largest weight of each group of 32 is a tie; eight codes a word.
            assert (a[name] == b[name]).float().mean() > 1 - 8 / 32, name
        else:
            assert torch.equal(a[name], b[name].to(a[name].dtype)), name
