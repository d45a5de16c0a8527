"""Builds a Job by hand, as tasks.runtime would, for running a job body in the test's process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.jobs.backends import Request
from tasks.runtime.process.events import Events, read_events
from tasks.runtime.process.job import Execution, Input, Job


def make_job(
    stage: str,
    out: Path,
    *,
    params: Mapping[str, Any],
    checkpoint: Path | None = None,
    micro_batch: int | None = None,
    device: str = "cpu",
    **inputs: Path,
) -> Job:
    """A job whose out folder exists; `inputs` are its input paths by name."""
    out.mkdir(parents=True, exist_ok=True)
    return Job(
        stage=stage,
        slug="test",
        fingerprint="f" * 64,
        entry=f"tasks.jobs.{stage}:run",
        params=dict(params),
        inputs={name: Input(path=path, digest=f"digest-{name}", fingerprint="f" * 64) for name, path in inputs.items()},
        out=out,
        checkpoint=checkpoint or out.parent / f"{out.name}-checkpoint",
        execution=Execution(device=device, threads=1, micro_batch=micro_batch),
    )


def make_request(model: Path, out: Path, *, rows: Sequence[Sequence[int]] = (), params: Mapping[str, Any]) -> Request:
    """What a backend is asked on a CPU, past the quantize job; `out` exists then."""
    out.mkdir(parents=True, exist_ok=True)
    events = Events(out / "events.jsonl")
    return Request(model=model, out=out, rows=rows, params=dict(params), device="cpu", events=events)


def notes(job: Job) -> dict[str, str]:
    """The job's notes by what they are about; the last one of each."""
    return {
        event["about"]: event["text"] for event, _ in read_events(job.out / "events.jsonl") if event["kind"] == "note"
    }


def curve(job: Job, name: str) -> dict[int, float]:
    """A metric's points by step."""
    events = [event for event, _ in read_events(job.out / "events.jsonl")]
    return {event["step"]: event["value"] for event in events if event["kind"] == "metric" and event["name"] == name}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
