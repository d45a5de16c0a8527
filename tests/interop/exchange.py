"""Runs writers and readers in their environments, and damages files to see that the comparison notices."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from recipes.schemes.scheme import Scheme
from tasks.quantize import ENVIRONMENTS
from tasks.runtime.process.environments import interpreter
from tasks.runtime.process.job import Job
from tasks.runtime.process.launch import child_env
from tasks.runtime.store.local import read_json
from tests.jobs.build import make_job

READS = {  # forms of files
    "transformers": ("gptq", "awq"),
    "transformers-default": ("gptq", "awq"),
    "autoawq": ("awq",),
    "auto-gptq": ("gptq", "awq"),
}
ROWS = 30


def form(folder: Path) -> str:
    """`gptq` or `awq`."""
    return read_json(folder / "config.json")["quantization_config"]["quant_method"]


def run_in(environment: str | None, job: Job) -> dict[str, Any]:
    """Run a job as a step would, in that environment; what its body returned."""
    folder = job.out.parent / f"{job.out.name}-job"
    folder.mkdir()
    job.dump(folder / "job.json")
    done = subprocess.run(
        [str(interpreter(environment)), "-P", "-m", "tasks.runtime.process.child", "run", str(folder / "job.json")],
        env=child_env(threads=job.execution.threads),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    (folder / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    answer = read_json(folder / "result.json") if (folder / "result.json").exists() else {"ok": False}
    assert answer["ok"], f"{answer.get('problem')}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return answer["result"]


def write_by(scheme: Scheme, model: Path, calibset: Path, out: Path) -> Path:
    """Quantize in the environment of the scheme's backend."""
    own = {"damp": 0.05} if scheme.method == "gptq" else {}
    params = {**scheme.params(), **own, "seed": 0}
    run_in(ENVIRONMENTS.get(scheme.backend), make_job("quantize", out, params=params, model=model, calibset=calibset))
    return out


def read_by(reader: str, models: dict[str, Path], rows: Path, out: Path) -> dict[str, str]:
    """Weights and logits of every model as `reader` has them, in out/NAME; its kernels by name."""
    job = make_job("readers", out, params={"reader": reader}, rows=rows, **models)
    return run_in(ENVIRONMENTS.get(reader), replace(job, entry="tests.interop.readers:run"))["kernels"]


def write_rows(dataset: Path, path: Path) -> Path:
    """The first 30 test rows of a dataset artifact."""
    table = pq.read_table(dataset / "rows.parquet", columns=["split", "input_ids"])
    pq.write_table(table.filter(pc.equal(table["split"], "test")).select(["input_ids"]).slice(0, ROWS), path)
    return path


def shifted(folder: Path, out: Path, *, what: str) -> Path:
    """A copy of a quantized model with one thing wrong in the first layer's k_proj.

    Args:
        folder: Quantized model.
        out: The copy.
        what: `zero point`: the first one is changed by one; `group`: the scales of the first two groups change places.
    """
    shutil.copytree(folder, out, copy_function=os.symlink)
    name = "model.layers.0.self_attn.k_proj"
    tensors = load_file(folder / "model.safetensors")
    if what == "zero point":
        tensors[f"{name}.qzeros"][0, 0] ^= 1
    else:
        scales = tensors[f"{name}.scales"]
        scales[[0, 1]] = scales[[1, 0]]
    (out / "model.safetensors").unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
