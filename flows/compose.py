"""compose: the one sentence of the pipeline. What runs it and what plans it differ only in `do`."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.adapters import read_adapter
from recipes.arms import EXTERNAL, TRAINED, Arm, Calibration, arms, controls
from recipes.files import data_files
from recipes.headers import read_headers
from recipes.load import Loaded
from recipes.problem import RecipeError
from recipes.rows import source_name
from recipes.schema import Recipe
from recipes.scorers import LmEval, Scorer, SqlExecution, input_name
from tasks import calibrate, choose, evaluate, measure, merge, prepare, quantize, reference, rehearse, train
from tasks.runtime.leases import cpu_slots
from tasks.runtime.pin import (
    ADAPTER_FILES,
    CODE_FILES,
    MODEL_FILES,
    Digests,
    HubId,
    Snapshot,
    external_file,
    external_folder,
    snapshots,
)
from tasks.runtime.step import External, Limits, Step, resolve_device
from tasks.runtime.tokenizer_files import TOKENIZER_FILES

# What a folder of lm-evaluation-harness tasks can hold that shapes a score.
TASK_FILES = tuple(f"**/*.{end}" for end in ("yaml", "py", "json", "jsonl", "csv", "tsv", "parquet", "txt"))


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Everything a recipe reads from outside, as bytes with a digest."""

    base: External
    tokenizer: External
    data: tuple[External, ...]
    general: External | None
    template: External | None
    scorers: dict[str, External]
    adapter: External | None = None
    calibration_text: External | None = None
    externals: Mapping[str, External] = field(default_factory=dict)


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


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All steps in the order in which they were composed, the arms, and the slug of what they are measured against."""

    steps: tuple[Step, ...]
    arms: tuple[ArmSteps, ...]
    reference: str | None


def pin(loaded: Loaded, home: Path) -> Pins:
    """Resolve paths and hub ids; digest what they name.

    Raises:
        RecipeError: Hub ids cannot be fetched: base and data at once.
    """
    recipe, digests = loaded.recipe, Digests(home)
    fetched = fetch(loaded)
    model = fetched.get("model.base") or _local(loaded, recipe.model.base)
    base = external_folder("base", model.folder, patterns=MODEL_FILES, digests=digests, source=model.source)
    tokens = external_folder(
        "tokenizer",
        model.folder,
        patterns=(*TOKENIZER_FILES, "generation_config.json"),
        digests=digests,
        source=model.source,
    )
    data = tuple(_source(loaded, number, fetched=fetched, digests=digests) for number in range(len(recipe.data.parts)))
    general = recipe.data.general and external_file("general", loaded.resolve(recipe.data.general), digests=digests)
    generic = recipe.calibrate.general if recipe.calibrate.controls else None
    text = generic and external_file("calibration_text", loaded.resolve(generic), digests=digests)
    named = recipe.model.chat_template
    template = (
        external_file("template", loaded.resolve(named), digests=digests) if named and named != "chatml" else None
    )
    scorers = {
        input_name(number): scorer_content(one, path, number, digests=digests)
        for number, one in enumerate(recipe.evaluate.scorers)
        if (path := loaded.content(one)) is not None
    }
    adapter = recipe.train.adapter and external_folder(
        "adapter",
        (there := fetched.get("train.adapter") or _local(loaded, recipe.train.adapter)).folder,
        patterns=ADAPTER_FILES,
        digests=digests,
        source=there.source,
    )
    externals: dict[str, External] = {}
    for name, one in recipe.evaluate.externals.items():
        found = fetched.get(f"evaluate.external.{name}") or _local(loaded, one.path)
        externals[name] = _model(name, found, digests, code=one.trust_remote_code)
    digests.save()
    return Pins(
        base=base,
        tokenizer=tokens,
        data=data,
        general=general or None,
        template=template,
        scorers=scorers,
        adapter=adapter or None,
        calibration_text=text or None,
        externals=externals,
    )


def _model(name: str, there: Snapshot, digests: Digests, *, code: bool) -> External:
    """An external model with its tokenizer, and with its Python files where they are run."""
    patterns = (*MODEL_FILES, *TOKENIZER_FILES, *(CODE_FILES if code else ()))
    return external_folder(name, there.folder, patterns=patterns, digests=digests, source=there.source)


def _local(loaded: Loaded, path: str) -> Snapshot:
    return Snapshot(folder=loaded.resolve(path), source=path)


def fetchable(loaded: Loaded) -> list[HubId]:
    """What the recipe names by hub id."""
    recipe = loaded.recipe
    asked: list[HubId] = []
    if loaded.base is None:
        model = recipe.model
        asked.append(HubId(name=model.base, revision=model.revision, kind="model", field="model.base"))
    for number, (part, here) in enumerate(zip(recipe.data.parts, loaded.data, strict=True)):
        if here is None:
            where = recipe.data.field(number)
            asked.append(HubId(name=part.path, revision=part.revision, kind="dataset", field=where))
    if recipe.train.adapter and loaded.adapter is None:
        asked.append(HubId(name=recipe.train.adapter, revision=None, kind="adapter", field="train.adapter"))
    for name, one in recipe.evaluate.externals.items():
        if loaded.externals[name] is None:
            where = f"evaluate.external.{name}"
            code = one.trust_remote_code
            asked.append(HubId(name=one.path, revision=one.revision, kind="model", field=where, code=code))
    return asked


def fetch(loaded: Loaded) -> dict[str, Snapshot]:
    """What the recipe names by hub id, by field; fetched together, so that their problems come at once."""
    asked = fetchable(loaded)
    try:
        found = snapshots(asked)
    except RecipeError as error:
        raise RecipeError(loaded.placed(problem) for problem in error.problems) from None
    return {hub.field: one for hub, one in zip(asked, found, strict=True)}


def _source(loaded: Loaded, number: int, *, fetched: Mapping[str, Snapshot], digests: Digests) -> External:
    """One source of the data: its file, or the files of its folder or snapshot that hold rows."""
    recipe = loaded.recipe.data
    asked, name = recipe.parts[number], source_name(number)
    there = fetched.get(recipe.field(number)) or _local(loaded, asked.path)
    if there.folder.is_file():
        return external_file(name, there.folder, digests=digests, source=there.source)
    files = [glob.escape(str(file.relative_to(there.folder))) for file in data_files(there.folder)]
    return external_folder(name, there.folder, patterns=files, digests=digests, source=there.source)


def scorer_content(scorer: Scorer, path: Path, number: int, *, digests: Digests) -> External:
    """What a scorer reads: a file, or the files of a folder that it looks at."""
    name = input_name(number)
    if isinstance(scorer, SqlExecution | LmEval):
        patterns = ("*.sql",) if isinstance(scorer, SqlExecution) else TASK_FILES
        return external_folder(name, path, patterns=patterns, digests=digests)
    return external_file(name, path, digests=digests)


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
    ahead = [step for row in rows for step in (row.model, row.adapter, row.evaluate, row.measure) if step]
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
