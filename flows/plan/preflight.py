"""Refuses, before anything is spent, what fits neither the memory nor the disk of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flows.mlflow_uri import silent, tracking_uri
from flows.plan.fit import calibration_problem, enough_tokens, fits, fitting, gpu_fits, on_card
from flows.plan.lookup import Planned
from flows.plan.machine import Memory, available, total_gpu_gib
from flows.plan.memory import FILES, ON_HOST, StepNeeds, predict
from flows.plan.row_sizes import RowSizes, data_bytes, row_sizes, tokens_per_byte
from flows.plan.sizes import GIB
from flows.plan.work import Work, work
from flows.reach import unreached
from recipes.checks.external import external_headers
from recipes.checks.train import device_problems
from recipes.data.rows import read_origin
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded
from recipes.schema import Recipe
from tasks.runtime.gpus import visible_gpus
from tasks.runtime.process.environments import environment_problem
from tasks.runtime.process.leases import cpu_slots
from tasks.runtime.step import Limits

SAMPLE_ROWS = 2000  # rows of the data that are read to tell how long rows are


def disk_problem(
    predicted: Sequence[StepNeeds], home: Path, *, download_gib: float = 0.0, hits: Sequence[Planned] = ()
) -> Problem | None:
    """What these steps leave, and what comes from a bucket, against the free space where the store lies.

    Args:
        predicted: Steps to make.
        home: Where the store lies.
        download_gib: Of hits that are in a bucket and not here.
        hits: Steps that are in the store: what gc would take of these, a run would make again.
    """
    parent = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(parent).free / GIB
    needed = download_gib + sum(step.disk_gib for step in predicted)
    if needed <= free:
        return None
    largest = sorted(predicted, key=lambda step: -step.disk_gib)[:3]
    which = ", ".join(f"{step.key} {step.disk_gib:.1f} GiB" for step in largest)
    if download_gib:
        which = f"downloads of hits {download_gib:.1f} GiB, {which}".rstrip(", ")
    return Problem(
        what=f"The steps to make would write {needed:.1f} GiB; {free:.1f} GiB are free.",
        where=str(home),
        why=f"The largest: {which}.",
        next=_room(home, hits, missing=needed - free),
    )


def _room(home: Path, hits: Sequence[Planned], *, missing: float) -> str:
    """What to type where so many GiB are missing."""
    larger = "set QUENCH_HOME to a larger disk, or lower evaluate.reference_gib"
    artifacts, wanted = unreached(home), tuple(f"{line.key}-{line.fingerprint[:12]}" for line in hits)
    again = [artifact for artifact in artifacts if artifact.name.startswith(wanted)]
    frees = (sum(artifact.free for artifact in artifacts) - sum(artifact.free for artifact in again)) / GIB
    if not frees:
        return f"Free space there (quench store du shows what takes it), {larger}."
    if frees < missing:
        return f"quench store gc --yes frees {frees:.1f} GiB, which is not enough (quench store du); {larger}."
    remark = " It takes steps of this recipe, too, that the run makes again." if again else ""
    return f"Run quench store gc --yes: it frees {frees:.1f} GiB that no run and no promotion reaches.{remark}"


# ---- memory


class Verdict(NamedTuple):
    """Steps that do not fit by a measured formula, and those that may not by one that no GPU has confirmed."""

    problems: list[Problem]
    doubts: list[Problem]


def judge(
    recipe: Recipe,
    headers: Headers,
    *,
    memory: Memory,
    device: str = "cpu",
    rows: RowSizes | None = None,
    slots: int = 1,
    make: frozenset[str] | None = None,
    externals: Mapping[str, Headers] | None = None,
) -> Verdict:
    """Steps that do not fit, one per stage and kind of estimate, with the largest batch and length that would.

    Args:
        recipe: The recipe.
        headers: Of the base.
        memory: Free memory.
        device: `cpu` or `cuda`.
        rows: Sizes of the data's rows, where they are known.
        slots: Steps that may run at once on CPU.
        make: Keys of the steps that are not in the store; None for all.
        externals: Headers of the external models by name.
    """

    def steps(recipe: Recipe) -> list[StepNeeds]:
        every = predict(recipe, headers, device=device, rows=rows, externals=externals)
        return [step for step in every if make is None or step.key in make]

    too_large: dict[tuple[str, bool], StepNeeds] = {}
    for step in steps(recipe):
        worst = too_large.get((step.stage, step.confirmed))
        if not fits(step, memory) and (worst is None or _weight(step) > _weight(worst)):
            too_large[step.stage, step.confirmed] = step
    explain = partial(
        _too_large,
        recipe=recipe,
        memory=memory,
        steps=steps,
        allows=lambda smaller: enough_tokens(smaller, headers, rows),
    )
    problems = [explain(step) for step in too_large.values() if step.confirmed]
    doubts = [explain(step) for step in too_large.values() if not step.confirmed]
    return Verdict(problems or _together(steps(recipe), memory=memory, slots=slots), doubts)


def _weight(step: StepNeeds) -> float:
    return step.needed_gib + step.gpu_gib


def _too_large(
    step: StepNeeds,
    *,
    recipe: Recipe,
    memory: Memory,
    steps: Callable[[Recipe], list[StepNeeds]],
    allows: Callable[[Recipe], bool],
) -> Problem:
    fit = fitting(step.stage, recipe, memory=memory, steps=steps, allows=allows)
    setting = None if fit.never else fit.setting
    on_gpu = not gpu_fits(step, memory)
    needs, free = (on_card(step), memory.gpu_gib or 0.0) if on_gpu else (step.needed_gib, memory.host_gib)
    verb, advice = ("needs", "") if step.confirmed else ("may need", " No GPU has confirmed this estimate.")
    return Problem(
        what=f"{step.key} {verb} {needs:.1f} GiB of {'GPU' if on_gpu else 'host'} memory; {free:.1f} GiB are free.",
        where=step.key,
        why=f"Mostly {largest_parts(step, on_gpu=on_gpu)}.{advice}",
        next=f"The largest that fits: {setting}."
        if setting
        else "No batch or length makes it fit: take a smaller base or a larger machine.",
    )


def largest_parts(step: StepNeeds, *, on_gpu: bool) -> str:
    """What a step's memory is mostly made of: `weights bf16 15.0 GiB, activations 3.1 GiB, layer 0.4 GiB`."""
    elsewhere = bool(step.gpu_gib)  # a step without a GPU has all its parts on the host
    counted = {
        name: size
        for name, size in step.parts.items()
        if name not in FILES and (not elsewhere or name.endswith(ON_HOST) != on_gpu)
    }
    counted |= {"process": 0.0} if on_gpu else {}  # CUDA's own, which is said elsewhere
    if elsewhere and not on_gpu:
        counted["libraries"] = step.needed_gib - sum(counted.values())
    largest = sorted(counted.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size:.1f} GiB" for name, size in largest if size >= 0.05) or "libraries"


def _together(steps: Sequence[StepNeeds], *, memory: Memory, slots: int) -> list[Problem]:
    """Steps of one stage run side by side on CPU; measure runs alone."""
    side_by_side = [step.needed_gib for step in steps if step.stage in ("quantize", "evaluate") and step.confirmed]
    needed = sum(sorted(side_by_side, reverse=True)[:slots])
    if needed <= memory.host_gib:
        return []
    fit = max(1, int(memory.host_gib / max(side_by_side)))
    return [
        Problem(
            what=f"{slots} steps at once need {needed:.1f} GiB of host memory; {memory.host_gib:.1f} GiB are free.",
            where="quantize, evaluate",
            why="As many run side by side as there are CPU slots.",
            next=f"Set the environment variable QUENCH_CPU_SLOTS={fit}.",
        )
    ]


def preflight(loaded: Loaded, planned: Sequence[Planned], *, home: Path, base: Path, limits: Limits) -> dict[str, Any]:
    """What a run will need, as runs/<id>/preflight.json holds it.

    Args:
        loaded: The recipe.
        planned: Lines of the plan: hits need nothing.
        home: Where the store lies.
        base: Folder of the base.
        limits: Device and threads.

    Raises:
        RecipeError: Steps to make fit neither memory nor disk, their environment is not installed, or MLflow does not
            answer.
    """
    recipe, headers = loaded.recipe, read_headers(base)
    rows = sampled(loaded, headers)
    memory, make = available(), frozenset(line.key for line in planned if not line.hit)
    externals = {name: external_headers(folder) for name, folder in loaded.externals.items() if folder}
    steps = predict(recipe, headers, device=limits.device, rows=rows, externals=externals)
    slots = 1 if limits.device == "cuda" else max(1, cpu_slots() // limits.threads)
    problems = list(device_problems(recipe, device=limits.device, gpus=len(visible_gpus())))
    problems += environment_problems(planned)
    problems += filter(None, [silent(tracking_uri(home))])
    verdict = judge(
        recipe,
        headers,
        memory=memory,
        device=limits.device,
        rows=rows,
        slots=slots,
        make=make,
        externals=externals,
    )
    problems += verdict.problems
    few = calibration_problem(recipe, headers, rows) if f"calibrate/{recipe.name}" in make else None
    download_gib = sum(line.download_bytes for line in planned) / GIB
    hits = [line for line in planned if line.hit]
    full = disk_problem([step for step in steps if step.key in make], home, download_gib=download_gib, hits=hits)
    if problems or full or few:
        raise RecipeError([*problems, *filter(None, (full, few))])
    worked = work(recipe, headers, rows)
    return {
        "device": limits.device,
        "free": memory._asdict(),
        "gpu_total_gib": total_gpu_gib() if limits.device == "cuda" else None,
        "warnings": [doubt.as_dict() for doubt in verdict.doubts],
        "steps": {step.key: _recorded(step, worked.get(step.key)) for step in steps},
    }


def _recorded(step: StepNeeds, done: Work | None) -> dict[str, Any]:
    """A step's line of preflight.json."""
    needs = {name: value for name, value in asdict(step).items() if name != "key"}
    return {**needs, "tokens": done and done.tokens, "flops": done and done.flops}


def environment_problems(planned: Sequence[Planned]) -> Iterator[Problem]:
    """Environments of steps to make that are not installed here."""
    for name in sorted({line.environment for line in planned if line.environment and not line.hit}):
        problem = environment_problem(name)
        if problem:
            needed = ", ".join(line.key for line in planned if line.environment == name and not line.hit)
            yield replace(problem, where=needed)


def sampled(loaded: Loaded, headers: Headers) -> RowSizes | None:
    """Sizes of the rows, from the first 2,000 of each local source."""
    samples = [(origin, read_origin(origin, max_rows=SAMPLE_ROWS).rows) for origin in loaded.origins.values()]
    size = sum(data_bytes(origin, rows) for origin, rows in samples)
    every = [row for _, rows in samples for row in rows]
    return row_sizes(every, data_bytes=size, per_byte=tokens_per_byte(headers))
