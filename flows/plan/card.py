"""The plan for a machine that need not be here: what every step takes, whether it fits, and what makes it fit.

Config, safetensors headers and the first rows are read, nothing else: no Prefect, no MLflow, no store, no environment
of a backend, no GPU.
"""

from __future__ import annotations

import functools
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.compose import Matrix, compose, reached
from flows.pins import light_pins
from flows.plan.fit import (
    LEFT_FREE,
    STAGES,
    Fitting,
    Setting,
    calibration_problem,
    combined,
    enough_tokens,
    fits,
    fitting,
    gpu_fits,
    leaving_free,
    on_card,
)
from flows.plan.history import Seconds, seconds
from flows.plan.machine import Memory
from flows.plan.memory import CUDA_CONTEXT, StepNeeds, predict
from flows.plan.preflight import largest_parts, sampled
from flows.plan.validate import fetched, unknown
from flows.plan.work import Work, work
from recipes.checks.check import check, load_and_check
from recipes.checks.external import external_headers
from recipes.checks.train import device_problems
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded, shown
from recipes.schema import Recipe
from tasks.runtime.hub.ids import HubId
from tasks.runtime.pin import headers_only


@dataclass(frozen=True, kw_only=True)
class CardStep:
    """One step on the machine.

    Attributes:
        needs: As the recipe is.
        setting: What makes it fit; empty where it fits as it is, None where nothing does.
        least: Its needs with the smallest setting that was tried.
        fitted: Its needs with the settings of all steps; None where it does not fit with them either.
        work: Its tokens and operations; None where it computes with no model, or the rows are not known.
        seconds: What it would take by earlier runs; None where there are none on such a GPU.
    """

    needs: StepNeeds
    setting: Setting | None
    least: StepNeeds
    fitted: StepNeeds | None
    work: Work | None
    seconds: Seconds | None

    def as_dict(self, memory: Memory) -> dict[str, Any]:
        """For --json; sizes in GiB."""
        return {
            "key": self.needs.key,
            "gpu_gib": on_card(self.needs),
            "gpu_left_gib": (memory.gpu_gib or 0.0) - on_card(self.needs),
            "host_gib": self.needs.needed_gib,
            "host_left_gib": _finite(memory.host_gib - self.needs.needed_gib),
            "disk_gib": self.needs.disk_gib,
            "tokens": self.work and round(self.work.tokens),
            "flops": self.work and self.work.flops,
            "seconds": self.seconds and self.seconds.seconds,
            "seconds_n": self.seconds.n if self.seconds else 0,
            "fits": self.setting is not None and not self.setting.values,
            "setting": None if self.setting is None else self.setting.values,
            "gpu_gib_with_settings": self.fitted and on_card(self.fitted),
            "host_gib_with_settings": self.fitted and self.fitted.needed_gib,
            "confirmed": self.needs.confirmed,
            "parts": dict(self.needs.parts),
        }


@dataclass(frozen=True, kw_only=True)
class CardPlan:
    """A recipe on a machine.

    Attributes:
        recipe: Its file.
        sets: The overrides that it was planned with.
        memory: The machine.
        steps: In the order of the pipeline.
        setting: What makes all steps fit that can.
        only: Arms whose steps all fit with it, where some steps never do; else the arms that were wanted. None is all,
            and where some steps never fit, that no arm is left.
        warnings: What a run would refuse for the rows that are here.
    """

    recipe: Path
    sets: tuple[str, ...]
    memory: Memory
    steps: tuple[CardStep, ...]
    setting: Setting
    only: tuple[str, ...]
    warnings: tuple[Problem, ...]

    @property
    def never(self) -> tuple[CardStep, ...]:
        """Steps that no setting makes fit."""
        return tuple(step for step in self.steps if step.setting is None)

    @property
    def command(self) -> str:
        """What runs it so that it fits."""
        chosen = [word for value in self.sets for word in ("--set", shlex.quote(value))]
        name = shown(self.recipe)
        verb = ["evaluate", name, "--only", *self.only] if self.only else ["run", name]
        return " ".join(filter(None, ["quench", *verb, *chosen, str(self.setting)]))

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "machine": {
                "gpu_gib": self.memory.gpu_gib,
                "gpus": self.memory.gpus,
                "host_gib": _finite(self.memory.host_gib),
            },
            "fits": not self.never,
            "settings": self.setting.values,
            "never": [step.needs.key for step in self.never],
            "only": list(self.only),
            "command": None if self.never and not self.only else self.command,
            "warnings": [warning.as_dict() for warning in self.warnings],
            "disk_gib": sum(step.needs.disk_gib for step in self.steps),
            "steps": [step.as_dict(self.memory) for step in self.steps],
        }


def plan_for(
    path: Path, memory: Memory, *, sets: Sequence[str] = (), only: Sequence[str] = (), home: Path | None = None
) -> CardPlan:
    """Predict every step of a recipe on a machine with a GPU.

    Args:
        path: Recipe file.
        memory: The machine; its GPUs are alike.
        sets: Overrides `a.b=c`.
        only: Arms that are wanted, see `compose`; none is all.
        home: QUENCH_HOME, whose earlier runs say how long steps took; it need not exist.

    Raises:
        RecipeError: Everything that is wrong with recipe and base, whatever the machine; more processes than GPUs.
    """
    loaded = load_and_check(path, sets=sets)
    problems = [
        *unknown(only, loaded.recipe, device="cuda"),
        *device_problems(loaded.recipe, device="cuda", gpus=memory.gpus),
    ]
    if problems:
        raise RecipeError(loaded.placed(problem) for problem in problems)
    with tempfile.TemporaryDirectory() as folder:
        pins = light_pins(loaded, Path(folder))
        local = fetched(loaded, pins)
        if local is not loaded and (problems := check(local, fetched=True)):
            raise RecipeError(problems)
        matrix = compose(_anywhere(local.recipe), pins, lambda step: None, only=only, device="cuda")
        headers = read_headers(pins.base.path)
        planned = _planned(local, headers, memory, matrix=matrix, path=path, sets=sets, only=only)
    return planned if home is None else _timed(planned, home, base=str(loaded.base or loaded.recipe.model.base))


def _timed(planned: CardPlan, home: Path, *, base: str) -> CardPlan:
    """The plan with the seconds that earlier runs took."""
    tokens = {step.needs.key: step.work.tokens for step in planned.steps if step.work}
    known = seconds(home, base=base, memory=planned.memory, tokens=tokens)
    return replace(planned, steps=tuple(replace(step, seconds=known.get(step.needs.key)) for step in planned.steps))


def hub_headers(hub: HubId) -> Headers:
    """Headers of a model on a hub; none of its weights is downloaded.

    Raises:
        RecipeError: It cannot be read, or is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        return read_headers(headers_only(hub, Path(folder)).folder)


def _anywhere(recipe: Recipe) -> Recipe:
    """The recipe without its device, which this machine need not have."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": "cpu"})})


def _planned(
    loaded: Loaded,
    headers: Headers,
    memory: Memory,
    *,
    matrix: Matrix,
    path: Path,
    sets: Sequence[str],
    only: Sequence[str],
) -> CardPlan:
    keys = {step.key for step in matrix.steps}
    rows = sampled(loaded, headers)
    externals = {name: external_headers(folder) for name, folder in loaded.externals.items() if folder}

    @functools.cache
    def predicted(recipe: str) -> list[StepNeeds]:  # many settings are tried, some of them twice
        every = predict(Recipe.model_validate_json(recipe), headers, device="cuda", rows=rows, externals=externals)
        return [step for step in every if step.key in keys]

    def steps(recipe: Recipe) -> list[StepNeeds]:
        return predicted(recipe.model_dump_json())

    written, room = steps(loaded.recipe), leaving_free(memory)
    by_stage = fit_all(
        loaded.recipe, memory=room, steps=steps, allows=lambda smaller: enough_tokens(smaller, headers, rows)
    )
    final = combined([fit.setting for fit in by_stage.values() if fit.setting is not None])
    least = {
        step.key: step
        for stage in {step.stage for step in written}
        for step in steps((by_stage[stage].smallest if stage in by_stage else Setting({})).applied(loaded.recipe))
        if step.stage == stage
    }
    fitted = {step.key: step for step in steps(final.applied(loaded.recipe)) if fits(step, room)}
    worked = work(loaded.recipe, headers, rows)
    lines = tuple(
        CardStep(
            needs=step,
            setting=_setting_of(step, by_stage.get(step.stage), room, fits_then=step.key in fitted),
            least=least[step.key],
            fitted=fitted.get(step.key),
            work=worked.get(step.key),
            seconds=None,
        )
        for step in written
    )
    lost = {line.needs.key for line in lines if line.setting is None}
    whole = [
        row.arm.slug
        for row in matrix.arms
        if row.evaluate and not lost & {step.key for step in reached(matrix.steps, [row])}
    ]
    return CardPlan(
        recipe=path,
        sets=tuple(sets),
        memory=memory,
        steps=lines,
        setting=final,
        only=tuple(whole if lost else only),
        warnings=tuple(filter(None, [calibration_problem(loaded.recipe, headers, rows)])),
    )


def fit_all(
    recipe: Recipe,
    *,
    memory: Memory,
    steps: Callable[[Recipe], list[StepNeeds]],
    allows: Callable[[Recipe], bool] = lambda _: True,
) -> dict[str, Fitting]:
    """How each stage fits that has settings, each found on top of those before it. See `fitting`."""
    found: dict[str, Fitting] = {}
    for stage in STAGES:
        fit = found[stage] = fitting(stage, recipe, memory=memory, steps=steps, allows=allows)
        recipe = fit.setting.applied(recipe) if fit.setting else recipe
    return found


def _setting_of(step: StepNeeds, of_stage: Fitting | None, memory: Memory, *, fits_then: bool) -> Setting | None:
    """What makes this step fit: nothing, its stage's setting, or None."""
    if fits(step, memory):
        return Setting({})
    return ((of_stage and of_stage.setting) or Setting({})) if fits_then else None


def _finite(size: float) -> float | None:
    """None for a host of which nothing is known, which JSON cannot say."""
    return None if size == float("inf") else size


# ---- for the terminal


COLUMNS = ("step", "GPU GiB", "left", "host GiB", "left", "disk GiB", "tokens", "TFLOP", "seconds", "fits")


def text(plan: CardPlan) -> str:
    """The table, what it counts, and what to type in the last line."""
    rows = [COLUMNS, *(_cells(step, plan.memory) for step in plan.steps)]
    shown = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows[1:])]
    rows = [tuple(row[column] for column in shown) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    disk = sum(step.needs.disk_gib for step in plan.steps)
    notes = [
        f"{_machine(plan.memory)}; the steps leave {disk:.1f} GiB on disk. CUDA's own {CUDA_CONTEXT} GiB are counted.",
        "Predicted from config, headers and the first rows; every row counts as long as the longest. "
        f"{100 * LEFT_FREE:.0f} % of the card are left free.",
    ]
    if any(not step.needs.confirmed for step in plan.steps):
        notes.append("~ no GPU has confirmed this estimate: a run warns of it and does not refuse (docs/gpu.md)")
    return "\n".join([*lines, "", *notes, "", *_verdict(plan)])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words to the left, figures to the right."""
    last = len(row) - 1
    return [
        cell.ljust(width) if column in (0, last) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _cells(step: CardStep, memory: Memory) -> tuple[str, ...]:
    needs = step.needs
    mark = "" if needs.confirmed else "~"
    gpu = on_card(needs)
    return (
        needs.key,
        f"{mark}{gpu:.1f}" if gpu else "",
        f"{(memory.gpu_gib or 0) - gpu:.1f}" if gpu else "",
        f"{needs.needed_gib:.1f}",
        "" if memory.host_gib == float("inf") else f"{memory.host_gib - needs.needed_gib:.1f}",
        f"{needs.disk_gib:.1f}" if needs.disk_gib >= 0.05 else "",
        f"{step.work.tokens:,.0f}" if step.work and step.work.tokens else "",
        _figure(step.work.flops / 1e12) if step.work and step.work.flops else "",
        f"{step.seconds.seconds:,.0f} (n {step.seconds.n})" if step.seconds else "",
        _fit(step, memory),
    )


def _figure(size: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _fit(step: CardStep, memory: Memory) -> str:
    if step.setting is None:
        on_gpu = not gpu_fits(step.least, leaving_free(memory))
        return f"NO: {largest_parts(step.least, on_gpu=on_gpu)}"
    if not step.setting.values:
        return "yes"
    then = f"{on_card(step.fitted):.1f}" if step.fitted and step.needs.gpu_gib else ""
    changed = " ".join(f"{name}={str(value).lower()}" for name, value in step.setting.values.items())
    return f"with {changed}" + (f": {then}" if then else "")


def _machine(memory: Memory) -> str:
    cards = f"{memory.gpus} GPUs of {memory.gpu_gib:g} GiB" if memory.gpus > 1 else f"One GPU of {memory.gpu_gib:g} GiB"
    known = memory.host_gib < float("inf")
    return f"{cards}, " + (f"{memory.host_gib:g} GiB of host memory" if known else "a host that is large enough")


def _by_stage(steps: Sequence[CardStep]) -> str:
    """`train; evaluate of base, merged-original`."""
    slugs: dict[str, list[str]] = {}
    for step in steps:
        stage, _, slug = step.needs.key.partition("/")
        slugs.setdefault(stage, []).append(slug)
    return "; ".join(
        f"{stage} of {', '.join(names)}" if stage in ("quantize", "evaluate", "measure") else stage
        for stage, names in slugs.items()
    )


def _verdict(plan: CardPlan) -> list[str]:
    """What fits; the last line is what to type."""
    if plan.never:
        sure = any(step.needs.confirmed for step in plan.never)
        says = "DOES NOT FIT, with any setting" if sure else "MAY NOT FIT, by estimates that no GPU has confirmed"
        lines = [f"{says}: {_by_stage(plan.never)}"]
        if plan.only:
            return [*lines, "These arms fit without them:", f"  {plan.command}"]
        return [*lines, "No arm is left: take a smaller base or a larger GPU."]
    if plan.setting.values:
        return ["FITS ONLY WITH OTHER SETTINGS than the recipe's:", f"  {plan.command}"]
    return ["Every step fits as the recipe is:", f"  {plan.command}"]
