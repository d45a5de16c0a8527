"""compose: the one sentence of the pipeline. What runs it and what plans it differ only in `do`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flows.pins import Pins
from recipes.arms import EXTERNAL, TRAINED, Arm, Calibration, arms, controls
from recipes.models.adapters import read_adapter
from recipes.models.headers import read_headers
from recipes.schema import Recipe
from tasks import calibrate, choose, evaluate, measure, merge, prepare, quantize, reference, rehearse, train
from tasks.runtime.process.leases import cpu_slots
from tasks.runtime.step import External, Limits, Step, resolve_device


@dataclass(frozen=True, kw_only=True)
class ArmSteps:
    """An arm and the steps that make it, score it and time it.

    `model` is None for the untouched base and for an external model; `evaluate` for an arm that cannot be; `measure`
    also where only the KV cache differs, which no kernel of ours stores smaller.
    """

    arm: Arm
    model: Step | None
    adapter: Step | None
    evaluate: Step | None
    measure: Step | None

    @property
    def steps(self) -> dict[str, Step | None]:
        """What it is for -> the step."""
        return {name: step for name, step in vars(self).items() if name != "arm"}

    @property
    def keys(self) -> dict[str, str | None]:
        """What it is for -> the key of the step."""
        return {name: step and step.key for name, step in self.steps.items()}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All steps in the order in which they were composed, the arms, and the slug of what they are measured against."""

    steps: tuple[Step, ...]
    arms: tuple[ArmSteps, ...]
    reference: str | None


def limits(recipe: Recipe) -> Limits:
    """The recipe's `run:` section with its defaults filled in for this machine."""
    device = resolve_device(recipe.run.device)
    threads = recipe.run.threads or (4 if device == "cuda" else 1)
    return Limits(
        device=device,
        threads=min(threads, cpu_slots()),
        micro_batch=recipe.run.micro_batch,
        processes=recipe.run.processes,
        launcher=recipe.run.launcher,
        time_limit_s=recipe.run.time_limit_s,
        log_level=recipe.run.log_level,
    )


def compose(recipe: Recipe, pins: Pins, do: Callable[[Step], object], *, only: Sequence[str] = ()) -> Matrix:
    """Spell the pipeline out, step by step; `do` is called once a step, after the steps that it needs.

    With `do` = submit Prefect runs it, with `do` = a lookup it is the plan: they cannot drift apart.

    Args:
        recipe: The recipe.
        pins: What it reads from outside.
        do: What is done with a step.
        only: Slugs of the arms that are wanted, or `external` for all of those: what they do not need is not done.
    """
    steps: list[Step] = []

    def made(step: Step) -> Step:
        steps.append(step)
        return step

    matrix = arms(recipe, adapter=read_adapter(pins.adapter.path).config if pins.adapter else None)
    wanted = [arm for arm in matrix if _is_wanted(arm, only)]
    dataset = made(
        prepare.step(recipe, data=pins.data, tokenizer=pins.tokenizer, general=pins.general, template=pins.template)
    )
    rehearsed = made(rehearse.step(recipe, dataset=dataset, scorers=pins.scorers))
    adapter = made(train.step(recipe, dataset=dataset, base=pins.base, adapter=pins.adapter, after=(rehearsed,)))
    merged = {
        onto: made(merge.step(recipe, base=pins.base, adapter=adapter, onto=onto))
        for onto in ("dequantized", "original")
    }
    judge = _judge(recipe, wanted)
    scored_against = made(_reference(recipe, pins, judge, dataset=dataset, adapter=adapter)) if judge else None
    widest = read_headers(pins.base.path).largest_in_features
    own = made(calibrate.step(recipe, dataset=dataset, largest_in_features=widest))
    calibsets: dict[Calibration, Step] = {"domain": own}
    models: dict[str, Step | None] = {}
    scores: dict[str, Step] = {}

    def loads(arm: Arm) -> dict[str, Step | External]:
        model = pins.externals[arm.slug] if arm.external else models[arm.slug] or pins.base
        return _there(model=model, dataset=dataset, adapter=adapter if arm.adapter else None)

    def score(arm: Arm) -> None:
        calibset = own if arm.kv == "fp8-calibrated" else None
        inputs = {**loads(arm), **_there(reference=scored_against, calibset=calibset), **pins.scorers}
        scores[arm.slug] = made(
            evaluate.step(recipe, arm.slug, kind=arm.kind, kv=arm.kv, inputs=inputs, after=(rehearsed,))
        )

    every = [arm for arm in matrix if arm.unavailable is None]
    own_files = [arm for arm in every if arm.of is None]
    schemes = {arm: arm.scheme for arm in own_files if arm.scheme}
    for kind in controls(every):
        calibsets[kind] = made(
            calibrate.control(recipe, kind, dataset=dataset, calibset=own, general=pins.calibration_text)
        )
    unquantized = [arm for arm in own_files if arm not in schemes]
    for arm in unquantized:  # before the choice, which may read the scores of the merged models
        models[arm.slug] = merged.get(arm.merge_base or "")
        score(arm)
    chosen = made(
        choose.step(
            recipe,
            merged=merged,
            scores={onto: scores[f"merged-{onto}"] for onto in merged},
            lineage={"base": pins.base, "adapter": adapter},
        )
    )
    for arm, scheme in schemes.items():
        origin = pins.base if arm.on_base else chosen
        models[arm.slug] = made(
            quantize.step(
                recipe,
                scheme,
                model=origin,
                calibset=calibsets[arm.calibration],
                arm=arm.slug,
                scales_from=pins.base if arm.scales_from_base else None,
            )
        )
    for arm in schemes:
        score(arm)
    for arm in every:
        if arm.of is not None:
            models[arm.slug] = models[arm.of]
            score(arm)
    speeds = _measured(recipe, own_files, loads, made)
    rows = [
        ArmSteps(
            arm=arm,
            model=models.get(arm.slug),
            adapter=adapter if arm.adapter and arm.unavailable is None else None,
            evaluate=scores.get(arm.slug),
            measure=speeds.get(arm.slug),
        )
        for arm in wanted
    ]
    reached = _reached(steps, rows) if only else tuple(steps)
    _each(reached, do)
    return Matrix(steps=reached, arms=tuple(rows), reference=judge)


def _each(steps: Sequence[Step], do: Callable[[Step], object]) -> None:
    for step in steps:
        do(step)


def _judge(recipe: Recipe, wanted: Sequence[Arm]) -> str | None:
    """What KL is measured against: nf4-adapter only where something trained is wanted anyway."""
    return recipe.evaluate.reference or (TRAINED if any(arm.is_trained for arm in wanted) else None)


def _reference(recipe: Recipe, pins: Pins, judge: str, *, dataset: Step, adapter: Step) -> Step:
    if judge == TRAINED:
        return reference.step(recipe, dataset=dataset, base=pins.base, adapter=adapter)
    return reference.external(recipe, dataset=dataset, model=pins.externals[judge])


def _is_wanted(arm: Arm, only: Sequence[str]) -> bool:
    """All are without `only`; the base goes with the external models, which are compared with it."""
    if not only or arm.slug in only:
        return True
    return EXTERNAL in only and (arm.external or arm.slug == "base")


def _reached(steps: Sequence[Step], rows: Sequence[ArmSteps]) -> tuple[Step, ...]:
    """The steps that these arms are made, scored and timed by, in their order."""
    found: dict[str, Step] = {}
    ahead = [step for row in rows for step in row.steps.values() if step]
    while ahead:
        step = ahead.pop()
        if step.key not in found:
            found[step.key] = step
            ahead += [one for one in (*step.inputs.values(), *step.after) if isinstance(one, Step)]
    return tuple(step for step in steps if step.key in found)


def _measured(
    recipe: Recipe,
    every: Sequence[Arm],
    loads: Callable[[Arm], dict[str, Step | External]],
    made: Callable[[Step], Step],
) -> dict[str, Step]:
    """The measure step of each of these arms, by slug."""
    if not recipe.measure.enabled:
        return {}
    there = limits(recipe)
    return {
        arm.slug: made(
            measure.step(recipe, arm.slug, kind=arm.kind, device=there.device, threads=there.threads, inputs=loads(arm))
        )
        for arm in every
    }


def _there(**inputs: Step | External | None) -> dict[str, Step | External]:
    """The inputs that there are."""
    return {name: one for name, one in inputs.items() if one is not None}
