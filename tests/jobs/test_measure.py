"""Measure: as many values as asked for, of the kernel that is named, in units that add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tasks.jobs import measure, prepare
from tasks.jobs.loading.load import load_bf16
from tasks.jobs.measure import _prompt
from tests.jobs.backends.test_rtn import rtn
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_prepare import PARAMS as PREPARE
from tests.jobs.test_prepare import questions
from tests.tiny import write_base

PARAMS = {"kind": "bf16", "batch": 2, "prompt_tokens": 40, "new_tokens": 4, "repeats": 5, "hardware": {}}
REPEATED = ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("measure") / "base")


@pytest.fixture(scope="module")
def dataset(base: Path) -> Path:
    out = base.parent / "dataset"
    data = write_jsonl(base.parent / "rows.jsonl", questions(60))
    prepare.run(make_job("prepare", out, params=PREPARE, data=data, tokenizer=base))
    return out


def speed(model: Path, dataset: Path, out: Path, **changed: Any) -> dict[str, Any]:
    measure.run(make_job("measure", out, params=PARAMS | changed, model=model, dataset=dataset))
    return json.loads((out / "speed.json").read_text())


def test_a_bf16_arm(base: Path, dataset: Path, tmp_path: Path) -> None:
    measured = speed(base, dataset, tmp_path / "out")
    for name in REPEATED:
        assert len(measured[name]) == 5
        assert min(measured[name]) > 0
    assert (measured["kernel"], measured["device"], measured["threads"]) == ("Linear", "cpu", 1)
    assert (measured["batch"], measured["context"], measured["new_tokens"]) == (2, 40, 4)
    assert measured["serving_kernel"] is False
    assert "not a serving kernel" in notes(make_job("measure", tmp_path / "out", params={}))["kernel"]
    weights = load_file(base / "model.safetensors")
    rotary = 2 * 16 * 4  # inv_freq, twice: 16 fp32
    assert measured["resident_bytes"] == pytest.approx(sum(tensor.nbytes for tensor in weights.values()), abs=rotary)
    assert 0.1 < measured["peak_rss_gib"] < 8


def test_nf4_is_smaller_than_bf16_and_its_scales_count(base: Path, dataset: Path, tmp_path: Path) -> None:
    nf4 = speed(base, dataset, tmp_path / "out", kind="nf4")
    assert nf4["kernel"] == "Linear4bit"
    model = load_bf16(base, device="cpu")
    embedding = model.get_input_embeddings().weight.numel()
    weights = sum(one.numel() for name, one in model.named_parameters() if "proj" in name)
    assert nf4["resident_bytes"] > embedding * 2 + weights * (4 + 8 / 64) / 8  # an 8-bit scale for 64 weights
    assert nf4["resident_bytes"] < sum(parameter.nbytes for parameter in model.parameters()) * 0.6


def test_a_quantized_arm_names_its_kernel(base: Path, dataset: Path, tmp_path: Path) -> None:
    measured = speed(rtn(base, tmp_path / "rtn", bits=4), dataset, tmp_path / "out", kind="quantized")
    assert measured["kernel"] == "TorchAtenLinear"
    assert measured["serving_kernel"] is False
    bf16 = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    assert measured["resident_bytes"] < bf16 / 2


def test_the_prompt_is_real_and_repeats_where_rows_end(dataset: Path) -> None:
    short, long = _prompt(dataset, 1, 10), _prompt(dataset, 3, 1000)
    assert short.shape == (1, 10)
    assert long.shape == (3, 1000)
    assert long.flatten()[:10].tolist() == short.flatten().tolist()
