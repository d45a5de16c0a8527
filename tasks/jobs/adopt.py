"""An adapter that was trained elsewhere -> the artifact that train would have made (train.adapter)."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from safetensors import safe_open

from recipes.models.adapters import CONFIG, RECORD, WEIGHTS, read_adapter
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def run(job: Job) -> dict[str, Any]:
    """Copy the adapter, with the dataset's tokenizer beside it. That it fits the base was checked before the run.

    Reads:
        adapter: PEFT folder. dataset: tokenizer/.
    Writes:
        adapter_config.json, adapter_model.safetensors, nf4.json and config.json (how it was trained; may be
        absent) and tokenizer/, all byte for byte; train.json.
    Metrics:
        None.

    Raises:
        StageError: inf or NaN in the adapter.
        RecipeError: The folder is no longer an adapter.
    """
    folder = job.inputs["adapter"].path
    adapter = read_adapter(folder)
    _refuse_broken(job)
    for name in (CONFIG, WEIGHTS, RECORD, "config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, job.out / name)
    shutil.copytree(job.inputs["dataset"].path / "tokenizer", job.out / "tokenizer")
    result = {
        "trained_here": False,
        "provenance": adapter.base_type,
        "evidence": adapter.evidence,
        "initialisation": adapter.initialisation,
        "parameters": sum(tensor.numel for tensor in adapter.tensors.values()),
    }
    job.write_json("train.json", result)
    job.events.note(
        "adapter",
        f"trained elsewhere ({result['parameters']:,} parameters); the base in that training: {adapter.base_type} "
        f"({adapter.evidence})",
    )
    return result


def _refuse_broken(job: Job) -> None:
    """Raise StageError where a tensor holds inf or NaN, with all their names."""
    path = job.inputs["adapter"].path / WEIGHTS
    with safe_open(path, framework="pt") as file:
        broken = [name for name in file.keys() if not torch.isfinite(file.get_tensor(name)).all()]  # noqa: SIM118
    if broken:
        raise StageError.of(
            what=f"{len(broken)} tensor(s) of the adapter hold inf or NaN",
            where=f"{path}: {', '.join(broken)}",
            why="its training diverged, or the file is damaged",
            next="name another checkpoint of it as train.adapter",
        )
