"""What fits a machine, and the settings that make a step fit: those that keep the results come first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flows.plan.machine import Memory
from flows.plan.memory import CUDA_CONTEXT, StepNeeds
from flows.plan.row_sizes import RowSizes
from recipes.models.headers import Headers
from recipes.problem import Problem
from recipes.schema import LEAST_ROWS, MOST_ROWS, TOKENS_PER_INPUT, Recipe

LEAST_TOKENS = 128  # no shorter rows are proposed: a prompt and its answer are seldom shorter
# of a card; measured peaks were up to 2 % above predicted ones (docs/gpu.md), and no allocator fills a card
LEFT_FREE = 0.05


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


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How one stage fits.

    Attributes:
        setting: The largest with which its steps fit, but for those that never do; None where none of them does.
        never: Keys of the steps that fit with no setting.
        smallest: The smallest setting that was tried: what is in the way with it is really in the way.
    """

    setting: Setting | None
    never: tuple[str, ...]
    smallest: Setting


def leaving_free(machine: Memory) -> Memory:
    """A machine that is planned for, less what of its card is better left free."""
    return machine._replace(gpu_gib=None if machine.gpu_gib is None else (1 - LEFT_FREE) * machine.gpu_gib)


def fits(step: StepNeeds, memory: Memory) -> bool:
    """The step's own memory is there, on the host and on the GPU."""
    return host_fits(step, memory) and gpu_fits(step, memory)


def host_fits(step: StepNeeds, memory: Memory) -> bool:
    """The host has what the step needs; files that the system can drop do not count."""
    return step.needed_gib <= memory.host_gib


def gpu_fits(step: StepNeeds, memory: Memory) -> bool:
    """The GPU has what the step needs, with the memory that no allocator counts."""
    return not step.gpu_gib or on_card(step) <= (memory.gpu_gib or 0.0)


def on_card(step: StepNeeds) -> float:
    """GiB of one GPU, with what no allocator counts; 0 for a step without one."""
    return step.gpu_gib + CUDA_CONTEXT if step.gpu_gib else 0.0


def fitting(
    stage: str,
    recipe: Recipe,
    *,
    memory: Memory,
    steps: Callable[[Recipe], list[StepNeeds]],
    allows: Callable[[Recipe], bool] = lambda _: True,
) -> Fitting:
    """The setting that changes least and makes every step of a stage fit, or those that can.

    Args:
        stage: `train`, `reference`, `evaluate` or `quantize`; no other has a setting.
        recipe: The recipe to shrink.
        memory: Free memory.
        steps: Predicts the steps of a recipe.
        allows: Says whether a recipe would run, see `enough_tokens`; where this one would, so does what is proposed.
    """

    def too_large(setting: Setting) -> tuple[str, ...]:
        of_stage = [step for step in steps(setting.applied(recipe)) if step.stage == stage]
        return tuple(step.key for step in of_stage if not fits(step, memory))

    unchanged = Setting({})
    now = too_large(unchanged)
    if not now:
        return Fitting(setting=unchanged, never=(), smallest=unchanged)
    bound = allows(recipe)
    every = _settings(stage, recipe, memory)
    smaller = [setting for setting in every if not bound or allows(setting.applied(recipe))]
    if not smaller:
        return Fitting(setting=None, never=now, smallest=unchanged)
    # The last one is the smallest, but for rows x length of a calibration set, where each side may count.
    ends = smaller if stage == "quantize" else smaller[-1:]
    smallest = min(ends, key=lambda setting: len(too_large(setting)))
    never = too_large(smallest)
    if set(never) >= set(now):
        return Fitting(setting=None, never=never, smallest=smallest)
    largest = next(setting for setting in smaller if set(too_large(setting)) <= set(never))
    return Fitting(setting=largest, never=never, smallest=smallest)


# ---- settings, from the largest to the smallest


def _settings(stage: str, recipe: Recipe, memory: Memory) -> Iterator[Setting]:
    if stage == "train":
        yield from _train_settings(recipe, memory.gpus if memory.gpu_gib else 1)
    elif stage in ("reference", "evaluate"):
        yield from _evaluate_settings(recipe)
    elif stage == "quantize":
        yield from _quantize_settings(recipe)


STAGES = ("train", "reference", "evaluate", "quantize")  # that have settings


def _halves(value: int, *, least: int) -> list[int]:
    """`value`, its half, the half of that and so on, down to `least`."""
    values = [value]
    while values[-1] // 2 >= least:
        values.append(values[-1] // 2)
    return values


def _train_settings(recipe: Recipe, gpus: int) -> Iterator[Setting]:
    """Ever smaller: micro-batches that divide the batch, recomputed activations, the base over GPUs, shorter rows."""
    run, batch = recipe.run, recipe.train.batch_size
    ways: list[dict[str, Any]] = [{}]
    if not recipe.train.gradient_checkpointing:
        ways.append({"train.gradient_checkpointing": True})
    sharded = run.launcher == "fsdp-qlora" and run.processes > 1
    shards = [] if sharded else [count for count in range(2, gpus + 1) if batch % count == 0]
    ways += [
        {"train.gradient_checkpointing": True, "run.processes": count, "run.launcher": "fsdp-qlora"} for count in shards
    ]
    for length in _halves(recipe.data.max_length, least=LEAST_TOKENS):
        shorter = {} if length == recipe.data.max_length else {"data.max_length": length}
        for way in ways:
            processes = way.get("run.processes", run.processes)
            for size in range(recipe.micro_batch, 0, -1):
                if batch % (size * processes) == 0:
                    yield Setting({"run.micro_batch": size, **way, **shorter})


def _evaluate_settings(recipe: Recipe) -> Iterator[Setting]:
    for length in _halves(recipe.data.max_length, least=LEAST_TOKENS):
        shorter = {} if length == recipe.data.max_length else {"data.max_length": length}
        for size in _halves(recipe.evaluate.batch_size, least=1):
            yield Setting({"evaluate.batch_size": size, **shorter})


def _quantize_settings(recipe: Recipe) -> Iterator[Setting]:
    rows = sorted({*_halves(recipe.calibrate.rows, least=LEAST_ROWS), min(recipe.calibrate.rows, LEAST_ROWS)})
    for length in _halves(recipe.calibrate.seq_len, least=LEAST_TOKENS):
        for count in reversed(rows):
            yield Setting({"calibrate.rows": count, "calibrate.seq_len": length})


# ---- calibration


def enough_tokens(recipe: Recipe, headers: Headers, rows: RowSizes | None) -> bool:
    """The calibration rows can have the tokens that the widest layer needs; none is longer than calibrate.seq_len."""
    calibrate = recipe.calibrate
    tokens = calibrate.seq_len if rows is None else min(rows.tokens, calibrate.seq_len)
    return calibrate.rows * tokens >= TOKENS_PER_INPUT * headers.largest_in_features


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


def combined(settings: Sequence[Setting]) -> Setting:
    """All of them as one; where two name a field, the later one counts, which was found on top of the earlier."""
    return Setting({name: value for setting in settings for name, value in setting.values.items()})
