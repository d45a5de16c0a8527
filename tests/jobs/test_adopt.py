"""train.adapter: the adopted adapter is byte for byte the one that was given, and merges as if trained here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.jobs import adopt, merge
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tests.jobs.build import make_job, notes
from tests.jobs.test_merge import plant_adapter
from tests.tiny import write_base


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/ as PEFT leaves it, and dataset/tokenizer/."""
    folder = tmp_path_factory.mktemp("adopt")
    base = write_base(folder / "base")
    plant_adapter(base, folder / "adapter")
    (folder / "dataset").mkdir()
    (folder / "adapter" / "tokenizer").rename(folder / "dataset" / "tokenizer")
    return folder


def job_for(out: Path, world: Path, *, adapter: Path | None = None) -> Job:
    params = {"trained_here": False}
    return make_job("adopt", out, params=params, dataset=world / "dataset", adapter=adapter or world / "adapter")


def test_files_byte_for_byte_and_no_claim_about_the_training(world: Path, tmp_path: Path) -> None:
    job = job_for(tmp_path / "out", world)
    result = adopt.run(job)
    assert (result["trained_here"], result["provenance"]) == (False, "unknown")
    assert json.loads((job.out / "train.json").read_text()) == result
    assert "the base in that training: unknown" in notes(job)["adapter"]
    files = {str(path.relative_to(job.out)): path for path in job.out.rglob("*") if path.is_file()}
    expected = {f"tokenizer/{path.name}": path for path in (world / "dataset" / "tokenizer").iterdir()}
    expected |= {name: world / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert set(files) == {*expected, "train.json", "events.jsonl"}  # no model card, no optimizer
    assert all(files[name].read_bytes() == path.read_bytes() for name, path in expected.items())


def test_it_merges_as_an_adapter_that_was_trained_here(world: Path, tmp_path: Path) -> None:
    adopt.run(job_for(tmp_path / "adapter", world))
    here = tmp_path / "here"  # what the train step would have left
    shutil.copytree(world / "adapter", here)
    shutil.copytree(world / "dataset" / "tokenizer", here / "tokenizer")
    for name in ("adapter", "here"):
        job = make_job(
            "merge",
            tmp_path / f"{name}-merged",
            params={"onto": "dequantized"},
            base=world / "base",
            adapter=tmp_path / name,
        )
        merge.run(job)
    ours, theirs = (tmp_path / f"{name}-merged" / "model.safetensors" for name in ("adapter", "here"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_its_files_tell_about_the_training_is_kept(world: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(world / "adapter", adapter)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantized = {"quantization_config": settings}
    (adapter / "config.json").write_text(json.dumps(quantized))
    job = job_for(tmp_path / "out", world, adapter=adapter)
    assert adopt.run(job)["provenance"] == "nf4"
    assert (job.out / "config.json").read_bytes() == (adapter / "config.json").read_bytes()


def test_nan_is_refused_with_the_names_of_all_tensors(world: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(world / "adapter", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    broken = sorted(tensors)[3:5]
    for name, value in zip(broken, (float("nan"), float("inf")), strict=True):
        tensors[name][0, 0] = torch.tensor(value)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StageError, match="2 tensor") as refused:
        adopt.run(job_for(tmp_path / "out", world, adapter=adapter))
    assert all(name in refused.value.problem.where for name in broken)
