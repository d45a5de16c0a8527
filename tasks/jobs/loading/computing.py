"""How a job computes: on which device and with which kernels, what an identity says of it, and what was really so."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from tasks.jobs.loading.kernels import kernel_of
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

COMPUTED = "computed.json"


def refuse_other_device(job: Job) -> None:
    """Refuse to score on another kind of device than the step's identity names.

    The identity is written where the run was started. On a cluster a step may land on another machine, and figures of
    one card would lie in the store as those of another, for every later run.

    Raises:
        StageError: This is another kind of device.
    """
    planned, here = job.params.get("device"), job.execution.kind
    if planned is None or here in planned.split(" or "):  # a job that is built by hand names none
        return
    raise StageError.of(
        what=f"this step was planned for {planned}, and here is {here}",
        where=f"{job.stage}/{job.slug}",
        why="sums in bf16 differ between kinds of devices, so its scores could not be compared with the other arms'",
        next="start the run on a machine of the kind that makes its steps, and let a cluster have one kind of GPU "
        "(CUDA_VISIBLE_DEVICES names those that Quench may take)",
    )


def computed(model: nn.Module, job: Job) -> dict[str, Any]:
    """What the scores were computed with, for the manifest; also written to computed.json, which `choose` reads."""
    record = {
        "device": job.execution.kind,
        "instructions": torch.backends.cpu.get_cpu_capability() if job.execution.device == "cpu" else None,
        "attention": attention_of(model),
        "threads": job.execution.threads,
        "batch_size": job.params["batch_size"],
    }
    (job.out / COMPUTED).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {"kernel": kernel_of(model), "computed": record}


def attention_of(model: nn.Module) -> str | None:
    """Transformers' word for the attention of the text decoder, `sdpa` or `eager`; None where it has none."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    return getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
