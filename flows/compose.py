"""compose: the one sentence of the pipeline. What runs it and what plans it differ only in `do`."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes.arms import Arm, arms
from recipes.files import data_files
from recipes.headers import read_headers
from recipes.load import Loaded
from recipes.rows import source_name
from recipes.schema import Recipe, SqlExecution
from recipes.schemes import parse_scheme
from tasks import calibrate, choose, evaluate, measure, merge, prepare, quantize, reference, train
from tasks.runtime.leases import cpu_slots
from tasks.runtime.pin import MODEL_FILES, TOKENIZER_FILES, Digests, Snapshot, external_file, external_folder, snapshot
from tasks.runtime.step import External, Limits, Step, resolve_device


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Everything a recipe reads from outside, as bytes with a digest."""

    base: External
    tokenizer: External
    data: tuple[External, ...]
    general: External | None
    template: External | None
    databases: External | None


@dataclass(frozen=True, kw_only=True)
class ArmSteps:
    """An arm and the steps that make it, score it and time it; `model` is None for the untouched base."""

    arm: Arm
    model: Step | None
    adapter: Step | None
    evaluate: Step
    measure: Step | None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All steps in the order in which they were composed, and the arms."""

    steps: tuple[Step, ...]
    arms: tuple[ArmSteps, ...]


def pin(loaded: Loaded, home: Path) -> Pins:
    """Resolve paths and hub ids; digest what they name.

    Raises:
        RecipeError: A hub id cannot be fetched.
    """
    recipe, digests = loaded.recipe, Digests(home)
    model = fetch_model(loaded)
    base = external_folder("base", model.folder, patterns=MODEL_FILES, digests=digests, source=model.source)
    tokens = external_folder(
        "tokenizer",
        model.folder,
        patterns=(*TOKENIZER_FILES, "generation_config.json"),
        digests=digests,
        source=model.source,
    )
    data = tuple(_source(loaded, number, digests=digests) for number in range(len(recipe.data.parts)))
    general = recipe.data.general and external_file("general", loaded.resolve(recipe.data.general), digests=digests)
    named = recipe.model.chat_template
    template = (
        external_file("template", loaded.resolve(named), digests=digests) if named and named != "chatml" else None
    )
    scorer = recipe.evaluate.scorer
    databases = (
        external_folder("databases", loaded.resolve(scorer.databases), patterns=("*.sql",), digests=digests)
        if isinstance(scorer, SqlExecution)
        else None
    )
    digests.save()
    return Pins(base=base, tokenizer=tokens, data=data, general=general or None, template=template, databases=databases)


def _source(loaded: Loaded, number: int, *, digests: Digests) -> External:
    """One source of the data: its file, or the files of its folder or snapshot that hold rows."""
    asked, path = loaded.recipe.data.parts[number], loaded.data[number]
    name, source = source_name(number), asked.path
    if path is None:
        where = loaded.where(loaded.recipe.data.field(number))
        path, source = snapshot(asked.path, revision=asked.revision, kind="dataset", where=where)
    if path.is_file():
        return external_file(name, path, digests=digests, source=source)
    files = [glob.escape(str(file.relative_to(path))) for file in data_files(path)]
    return external_folder(name, path, patterns=files, digests=digests, source=source)


def fetch_model(loaded: Loaded) -> Snapshot:
    """Folder of the base model and where it came from (`org/name@commit`, or the path as written)."""
    model = loaded.recipe.model
    folder = loaded.base
    if folder is None:
        return snapshot(model.base, revision=model.revision, kind="model", where=loaded.where("model.base"))
    return Snapshot(folder=folder, source=model.base)


def limits(recipe: Recipe) -> Limits:
    """The recipe's `run:` section with its defaults filled in for this machine."""
    device = resolve_device(recipe.run.device)
    threads = recipe.run.threads or (4 if device == "cuda" else 1)
    return Limits(
        device=device,
        threads=min(threads, cpu_slots()),
        micro_batch=recipe.run.micro_batch,
        time_limit_s=recipe.run.time_limit_s,
        log_level=recipe.run.log_level,
    )


def compose(recipe: Recipe, pins: Pins, do: Callable[[Step], object]) -> Matrix:
    """Spell the pipeline out, step by step; `do` is called once a step, after the steps that it needs.

    With `do` = submit Prefect runs it, with `do` = a lookup it is the plan: they cannot drift apart.
    """
    steps: list[Step] = []

    def made(step: Step) -> Step:
        steps.append(step)
        do(step)
        return step

    dataset = made(
        prepare.step(recipe, data=pins.data, tokenizer=pins.tokenizer, general=pins.general, template=pins.template)
    )
    adapter = made(train.step(recipe, dataset=dataset, base=pins.base))
    merged = {
        onto: made(merge.step(recipe, base=pins.base, adapter=adapter, onto=onto))
        for onto in ("dequantized", "original")
    }
    scored_against = made(reference.step(recipe, dataset=dataset, base=pins.base, adapter=adapter))
    widest = max(layer.in_features for layer in read_headers(pins.base.path).linears)
    calibset = made(calibrate.step(recipe, dataset=dataset, largest_in_features=widest))
    chosen = made(
        choose.step(
            recipe,
            candidates={recipe.merge.base: merged[recipe.merge.base]},
            lineage={"base": pins.base, "adapter": adapter},
        )
    )

    models: dict[str, Step | None] = {}
    for arm in arms(recipe):
        if arm.scheme is None:
            models[arm.slug] = merged.get(arm.merge_base or "")
        else:
            origin = pins.base if arm.on_base else chosen
            models[arm.slug] = made(
                quantize.step(recipe, parse_scheme(arm.scheme), model=origin, calibset=calibset, arm=arm.slug)
            )

    rows: list[ArmSteps] = []
    loads: dict[str, dict[str, Step | External]] = {}
    for arm in arms(recipe):
        loads[arm.slug] = {"model": models[arm.slug] or pins.base, "dataset": dataset}
        if arm.adapter:
            loads[arm.slug]["adapter"] = adapter
    scores = {}
    for arm in arms(recipe):
        inputs = {**loads[arm.slug], "reference": scored_against}
        if pins.databases is not None:
            inputs["databases"] = pins.databases
        scores[arm.slug] = made(evaluate.step(recipe, arm.slug, kind=arm.kind, inputs=inputs))
    there = limits(recipe)
    for arm in arms(recipe):
        speed = None
        if recipe.measure.enabled:
            speed = made(
                measure.step(
                    recipe,
                    arm.slug,
                    kind=arm.kind,
                    device=there.device,
                    threads=there.threads,
                    inputs=loads[arm.slug],
                )
            )
        rows.append(
            ArmSteps(
                arm=arm,
                model=models[arm.slug],
                adapter=adapter if arm.adapter else None,
                evaluate=scores[arm.slug],
                measure=speed,
            )
        )
    return Matrix(steps=tuple(steps), arms=tuple(rows))
