"""Refuses, before anything is spent, what fits neither the memory nor the disk of this machine."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from flows.mlflow_uri import silent, tracking_uri
from flows.plan.lookup import Planned
from flows.plan.memory import CUDA_CONTEXT, FILES, GIB, StepNeeds, predict
from flows.plan.row_sizes import RowSizes, data_bytes, row_sizes, tokens_per_byte
from recipes.checks.external import external_headers
from recipes.checks.train import device_problems
from recipes.data.rows import read_origin
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded
from recipes.schema import MOST_ROWS, TOKENS_PER_INPUT, Recipe
from tasks.runtime.gpus import all_gpus, visible_gpus
from tasks.runtime.process.environments import environment_problem
from tasks.runtime.process.leases import cpu_slots
from tasks.runtime.step import Limits

SAMPLE_ROWS = 2000  # rows of the data that are read to tell how long rows are


class Memory(NamedTuple):
    """Free memory of this machine, GiB; gpu_gib is that of the smallest GPU, None without one."""

    host_gib: float
    gpu_gib: float | None


def available() -> Memory:
    """Free host memory (of the control group, where it is smaller) and free memory of the smallest GPU."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return Memory(host_gib=free / GIB, gpu_gib=_free_gpu_gib())


def _free_gpu_gib() -> float | None:
    return min((gpu.free_bytes / GIB for gpu in all_gpus() if gpu.free_bytes is not None), default=None)


def disk_problem(predicted: Sequence[StepNeeds], home: Path, *, download_gib: float = 0.0) -> Problem | None:
    """What these steps leave, and what comes from a bucket, against the free space where the store lies."""
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
        next="Free space there, set QUENCH_HOME to a larger disk, or lower evaluate.reference_gib.",
    )


def calibration_problem(recipe: Recipe, headers: Headers, rows: RowSizes | None) -> Problem | None:
    """Too few calibration tokens, by an estimate that is rather high; the job counts them exactly."""
    drawn, needed = recipe.calibrate.rows, TOKENS_PER_INPUT * headers.largest_in_features
    if rows is None or drawn * rows.tokens >= needed:
        return None
    enough = math.ceil(needed / rows.tokens)
    return Problem(
        what=f"Calibration needs {needed} tokens; {drawn} rows have about {drawn * rows.tokens:.0f}.",
        where="calibrate.rows",
        why=f"An average row has about {rows.tokens:.0f} tokens (an estimate from the first rows, rather high); with "
        f"fewer than {TOKENS_PER_INPUT} tokens per input the widest layer's Hessian is badly estimated.",
        next=f"Set calibrate.rows to {enough}."
        if enough <= min(MOST_ROWS, rows.rows)
        else f"{enough} rows like these would do: give longer rows, or calibrate.allow_unusual_size a reason.",
    )


# ---- refusing


class Setting(NamedTuple):
    """Fields to override and their values; none leaves the recipe as it is."""

    values: dict[str, Any]

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with these values."""
        raw = recipe.model_dump()
        for field, value in self.values.items():
            section, _, name = field.partition(".")
            raw[section][name] = value
        return Recipe.model_validate(raw)

    def __str__(self) -> str:
        return " ".join(f"--set {name}={str(value).lower()}" for name, value in self.values.items())


def _halves(value: int, *, least: int) -> list[int]:
    """`value`, its half, the half of that and so on, down to `least`."""
    values = [value]
    while values[-1] // 2 >= least:
        values.append(values[-1] // 2)
    return values


def _train_settings(recipe: Recipe) -> Iterator[Setting]:
    """Ever smaller: micro-batches that divide the batch, recomputed activations, shorter rows."""
    batch = recipe.train.batch_size
    micro = [size for size in range(recipe.micro_batch, 0, -1) if batch % size == 0]
    for length in _halves(recipe.data.max_length, least=16):
        shorter = {} if length == recipe.data.max_length else {"data.max_length": length}
        for size in micro:
            yield Setting({"run.micro_batch": size, **shorter})
        yield Setting({"run.micro_batch": 1, "train.gradient_checkpointing": True, **shorter})


def _reference_settings(recipe: Recipe) -> Iterator[Setting]:
    """Smaller batches, then fewer stored logits."""
    yield from _evaluate_settings(recipe)
    for times in (2, 4, 8, 16):
        yield Setting({"evaluate.batch_size": 1, "evaluate.reference_gib": recipe.evaluate.reference_gib / times})


def _evaluate_settings(recipe: Recipe) -> Iterator[Setting]:
    for length in _halves(recipe.data.max_length, least=16):
        shorter = {} if length == recipe.data.max_length else {"data.max_length": length}
        for size in _halves(recipe.evaluate.batch_size, least=1):
            yield Setting({"evaluate.batch_size": size, **shorter})


def _quantize_settings(recipe: Recipe) -> Iterator[Setting]:
    for length in _halves(recipe.calibrate.seq_len, least=32):
        yield Setting({"calibrate.rows": 128, "calibrate.seq_len": length})


SETTINGS: dict[str, Callable[[Recipe], Iterator[Setting]]] = {
    "train": _train_settings,
    "reference": _reference_settings,
    "evaluate": _evaluate_settings,
    "quantize": _quantize_settings,
}


def refuse(
    recipe: Recipe,
    headers: Headers,
    *,
    memory: Memory,
    device: str = "cpu",
    rows: RowSizes | None = None,
    slots: int = 1,
    make: frozenset[str] | None = None,
    externals: Mapping[str, Headers] | None = None,
) -> list[Problem]:
    """Steps that cannot fit, one per stage, with the largest batch and length that would.

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

    too_large: dict[str, StepNeeds] = {}
    for step in steps(recipe):
        worst = too_large.get(step.stage)
        if not _fits(step, memory) and (worst is None or _weight(step) > _weight(worst)):
            too_large[step.stage] = step
    problems = [_too_large(step, recipe, memory=memory, steps=steps) for step in too_large.values()]
    return problems or _together(steps(recipe), memory=memory, slots=slots)


def _weight(step: StepNeeds) -> float:
    return step.needed_gib + step.gpu_gib


def _fits(step: StepNeeds, memory: Memory) -> bool:
    gpu = memory.gpu_gib or 0.0
    return step.needed_gib <= memory.host_gib and (not step.gpu_gib or step.gpu_gib + CUDA_CONTEXT <= gpu)


def largest_fitting(
    stage: str, recipe: Recipe, *, memory: Memory, steps: Callable[[Recipe], list[StepNeeds]]
) -> Setting | None:
    """The largest batch and length with which every step of a stage fits; None where none does.

    Args:
        stage: `train`, `reference`, `evaluate` or `quantize`; no other has a setting.
        recipe: The recipe to shrink.
        memory: Free memory.
        steps: Predicts the steps of a recipe.
    """
    for setting in (Setting({}), *SETTINGS.get(stage, lambda _: iter(()))(recipe)):
        if all(_fits(step, memory) for step in steps(setting.applied(recipe)) if step.stage == stage):
            return setting
    return None


def _too_large(
    step: StepNeeds, recipe: Recipe, *, memory: Memory, steps: Callable[[Recipe], list[StepNeeds]]
) -> Problem:
    fitting = largest_fitting(step.stage, recipe, memory=memory, steps=steps)
    free_gpu = memory.gpu_gib or 0.0
    on_gpu = bool(step.gpu_gib) and step.gpu_gib + CUDA_CONTEXT > free_gpu
    needs, free = (step.gpu_gib + CUDA_CONTEXT, free_gpu) if on_gpu else (step.needed_gib, memory.host_gib)
    counted = {name: size for name, size in step.parts.items() if name not in FILES}
    largest = sorted(counted.items(), key=lambda part: -part[1])[:3]
    return Problem(
        what=f"{step.key} needs {needs:.1f} GiB of {'GPU' if on_gpu else 'host'} memory; {free:.1f} GiB are free.",
        where=step.key,
        why=f"Mostly {', '.join(f'{name} {size:.1f} GiB' for name, size in largest)}.",
        next=f"The largest that fits: {fitting}."
        if fitting
        else "No batch or length makes it fit: take a smaller base or a larger machine.",
    )


def _together(steps: Sequence[StepNeeds], *, memory: Memory, slots: int) -> list[Problem]:
    """Steps of one stage run side by side on CPU; measure runs alone."""
    side_by_side = [step.needed_gib for step in steps if step.stage in ("quantize", "evaluate")]
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
    problems += refuse(
        recipe,
        headers,
        memory=memory,
        device=limits.device,
        rows=rows,
        slots=slots,
        make=make,
        externals=externals,
    )
    few = calibration_problem(recipe, headers, rows) if f"calibrate/{recipe.name}" in make else None
    download_gib = sum(line.download_bytes for line in planned) / GIB
    full = disk_problem([step for step in steps if step.key in make], home, download_gib=download_gib)
    if problems or full or few:
        raise RecipeError([*problems, *filter(None, (full, few))])
    return {
        "device": limits.device,
        "free": memory._asdict(),
        "steps": {step.key: {name: value for name, value in asdict(step).items() if name != "key"} for step in steps},
    }


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
