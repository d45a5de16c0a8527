"""The last section of the report: time, memory, machine and origin of a run, its steps, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.report.document import Failure, Making, Source, StepJson, StepMemory
from flows.results.read import Run, RunArm, RunStep, notes

STAGES = (
    "prepare",
    "rehearse",
    "train",
    "merge",
    "reference",
    "calibrate",
    "choose",
    "quantize",
    "evaluate",
    "measure",
    "serve",
)


def making_of(run: Run) -> Making:
    """The section of a run."""
    steps = list(run.steps.values())
    failures = [_failure(step, run) for step in steps if not step.ok]
    return {
        "seconds": _stage_seconds(run),
        "wall_seconds": run.raw.get("seconds"),
        "memory": [_memory(step, run.predicted[step.key]) for step in steps if step.key in run.predicted],
        "hardware": run.raw["hardware"],
        "versions": run.raw["versions"],
        "sources": _sources(run.raw),
        "code": list(run.raw.get("code") or []),
        "steps": [_step(step) for step in steps],
        "failures": [*failures, *(failure for step in steps for failure in _unscored(step, run))],
        "notes": [note._asdict() for note in notes(steps)],
    }


def _stage_seconds(run: Run) -> dict[str, float]:
    """Seconds that the making of this run's artifacts took, by stage; a hit counts with what it took when made."""
    by_stage: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for step in run.steps.values():
        if step.manifest is not None:
            by_stage.setdefault(step.stage, []).append(step.manifest["seconds"])
    return {stage: round(sum(seconds), 3) for stage, seconds in by_stage.items() if seconds}


def _memory(step: RunStep, predicted: Mapping[str, float | None]) -> StepMemory:
    measured = step.manifest or {}
    return {
        "step": step.key,
        "predicted_host_gib": predicted.get("host_gib"),
        "measured_host_gib": measured.get("peak_rss_gib"),
        "predicted_gpu_gib": predicted.get("gpu_gib"),
        "measured_gpu_gib": measured.get("peak_gpu_gib"),
    }


def _sources(raw: Mapping[str, Any]) -> dict[str, Source]:
    """Where base, data (data, data-1 ...) and adapter came from."""
    names = [name for name in raw if name in ("base", "data", "adapter") or name.startswith("data-")]
    return {name: source_of(raw[name]) for name in names}


def source_of(origin: Mapping[str, Any]) -> Source:
    """Of a line of steps.json."""
    return {"source": origin.get("source"), "digest": origin.get("digest")}


def _step(step: RunStep) -> StepJson:
    manifest = step.manifest or {}
    line: StepJson = {
        "key": step.key,
        "status": step.status,
        "path": step.path,
        "fingerprint": step.fingerprint,
        "digest": manifest.get("digest"),
        "seconds": manifest.get("seconds"),
        "attempts": manifest.get("attempts"),
        "finished_at": manifest.get("finished_at"),
        "execution": manifest.get("execution"),
    }
    if step.node:
        line["node"] = step.node
    return line


def _unscored(step: RunStep, run: Run) -> list[Failure]:
    """Scores that an evaluate step could not give, though it has its other ones."""
    problems = (step.manifest or {}).get("result", {}).get("problems", {})
    return [
        {
            "step": step.key,
            "status": "partial",
            "problem": dict(problem),
            "why": f"{step.key}, {metric}: {step.problems[metric]}",
            "log": None,
            "arms": [arm.slug for arm in run.arms if step.key in _behind(arm)],
        }
        for metric, problem in problems.items()
    ]


def _failure(step: RunStep, run: Run) -> Failure:
    return {
        "step": step.key,
        "status": step.status,
        "problem": dict(step.problem) if step.problem else None,
        "why": step.trouble,
        "log": step.log,
        "arms": [arm.slug for arm in run.arms if step.key in _behind(arm)],
    }


def _behind(arm: RunArm) -> tuple[str | None, ...]:
    """Keys of the steps that an arm's figures rest on."""
    return arm.model, arm.adapter, arm.evaluate, arm.measure, arm.serve
