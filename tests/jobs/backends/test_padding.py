"""Padding enters no calibration statistic: GPTQModel leaves masked tokens out, and ours gives it none."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.jobs.backends import gptqmodel
from tasks.jobs.loading.environment import tame_gptqmodel
from tests.jobs.build import make_job, make_request
from tests.jobs.test_quantize import params

LENGTHS, PADDED = (96, 80, 96, 61, 90, 77), 128
FILL = 7  # a token like any other: the embedding of the padding token is zero and would hide itself
SLUG = "gptq-w4-g32"


def rows() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(4, 300, (length,), generator=draw).tolist() for length in LENGTHS]


def by_library(base: Path, out: Path, *, masked: bool) -> dict[str, Tensor]:
    """What GPTQModel itself makes of the rows, padded to 128 in one batch."""
    tame_gptqmodel()
    from gptqmodel import GPTQModel

    samples = [
        {
            "input_ids": row + [FILL] * (PADDED - len(row)),
            "attention_mask": [1] * len(row) + [0 if masked else 1] * (PADDED - len(row)),
        }
        for row in rows()
    ]
    with gptqmodel._scratch(None), contextlib.redirect_stdout(io.StringIO()):
        loaded = GPTQModel.load(str(base), gptqmodel._config(params(SLUG) | {"damp": 0.05}, device="cpu"), device="cpu")
        loaded.quantize(samples, batch_size=len(samples))
        loaded.save(str(out))
    return load_file(out / "model.safetensors")


def test_the_same_rows_padded_and_not_give_equal_scales(base: Path, tmp_path: Path) -> None:
    """Bit for bit in the layers that no attention comes before.

    Behind it the batch's mask takes another kernel of attention, whose last bits differ; this random model turns them
    into other codes in every later layer, so those say nothing about padding.
    """
    job = make_job("quantize", tmp_path / "ours", params={})
    scheme_params = params(SLUG) | {"damp": 0.05}
    gptqmodel.quantize(make_request(base, job.out, rows=rows(), params=scheme_params))
    ours = load_file(job.out / "model.safetensors")
    masked, unmasked = (by_library(base, tmp_path / str(mask), masked=mask) for mask in (True, False))
    first = [
        name
        for name in ours
        if name.startswith("model.layers.0.self_attn.") and name.split(".")[4] in ("q_proj", "k_proj", "v_proj")
    ]
    assert len(first) == 12
    assert all(torch.equal(ours[name], masked[name]) for name in first)
    changed = [name for name in first if not torch.equal(ours[name], unmasked[name])]
    assert {name.split(".")[4] for name in changed} == {"q_proj", "k_proj", "v_proj"}  # padding would have shown
