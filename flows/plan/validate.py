"""validate: everything that can be refused before GPU time is spent, all at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flows.compose import limits, machine
from flows.pins import Pins, fetchable, pin
from flows.plan.lookup import Planned, plan
from flows.plan.preflight import preflight
from flows.plan.registered import earlier, register
from recipes.arms import EXTERNAL, arms
from recipes.checks.check import check, check_data, load_and_read
from recipes.checks.rows import warnings_at
from recipes.checks.serving import warnings
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded
from recipes.schema import Recipe
from tasks.runtime.process.environments import locked_versions, off_lock
from tasks.runtime.step import resolve_device
from tasks.runtime.store.home import open_home
from tasks.runtime.store.open import open_store


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A recipe that may run: pinned, planned, and small enough for this machine.

    Attributes:
        warnings: What may not fit a GPU by an estimate that none has confirmed, what serve.engine would refuse, a test
            set that is too small for the gate, packages off the lock.
        registered: What it can tell, before anything is spent; see flows/plan/registered.py.
    """

    loaded: Loaded
    pins: Pins
    plan: list[Planned]
    preflight: dict[str, Any]
    warnings: list[Problem]
    registered: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.recipe


def validate(path: Path, *, sets: Sequence[str], home: Path, only: Sequence[str] = ()) -> Validated:
    """Load, check, pin, plan and predict.

    Args:
        path: Recipe file.
        sets: Overrides `a.b=c`.
        home: QUENCH_HOME.
        only: Arms that are wanted, see `compose`; none is all.

    Raises:
        RecipeError: Everything that is wrong with recipe, base and rows; else that the home cannot be written; else
            everything that this machine or MLflow lacks.
    """
    loaded, rows = load_and_read(path, sets=sets)
    resolve_device(loaded.recipe.run.device, where=loaded.where("run.device"))
    open_home(home)
    if problems := list(unknown(only, loaded.recipe)):
        raise RecipeError(problems)
    pins = pin(loaded, home)
    local = fetched(loaded, pins)
    if local is not loaded:
        rows = check_data(local)
        if problems := [*check(local, fetched=True), *rows.problems]:
            raise RecipeError(problems)
    store = open_store(home)
    store.check()
    planned = plan(loaded.recipe, pins, store, only=only)
    predicted = preflight(local, planned, home=home, base=pins.base.path, limits=limits(loaded.recipe))
    doubts = [Problem(**doubt) for doubt in predicted["warnings"]]
    before = earlier(home, loaded.recipe)
    few = warnings_at(local, rows, before.rate) if before else rows.warnings
    doubts += [*warnings(local), *(() if only else few), *other_packages()]
    registered = register(
        loaded.recipe,
        rows.sizes,
        home=home,
        inputs=[source.digest for source in (pins.base, *pins.data, pins.adapter) if source],
        scored=scored_before(planned, loaded.recipe),
        before=before,
    )
    return Validated(
        loaded=loaded, pins=pins, plan=planned, preflight=predicted, warnings=doubts, registered=registered
    )


def scored_before(planned: Sequence[Planned], recipe: Recipe) -> list[str]:
    """Arms that may be promoted, or that a candidate is compared with, and whose scores are in the store already."""
    trained = {f"evaluate/{arm.slug}": arm.slug for arm in arms(recipe) if arm.is_trained}
    return [trained[line.key] for line in planned if line.hit and line.key in trained]


def other_packages() -> list[Problem]:
    """One warning where packages are installed in other versions than the lock's."""
    other, locked = off_lock(), locked_versions()
    if not other:
        return []
    which = ", ".join(f"{name} {version} ({locked[name]})" for name, version in sorted(other.items()))
    return [
        Problem(
            what=f"{len(other)} packages are not those of the lock.",
            where=f"{sys.prefix}, infra/locks/main.txt",
            why=f"{which}. Quench is tested with the lock's versions; artifacts carry those that are installed.",
            next="make install puts the lock's in place.",
        )
    ]


def unknown(only: Sequence[str], recipe: Recipe, *, device: str | None = None) -> Iterator[Problem]:
    """Words of --only that name no arm of the recipe, or external models where there are none.

    Args:
        only: The words.
        recipe: The recipe.
        device: Where arms are scored; None for what the recipe says of this machine.
    """
    device = resolve_device(recipe.run.device) if device is None else device
    slugs = [arm.slug for arm in arms(recipe, machine=machine(recipe, device))]
    for name in only:
        if name == EXTERNAL and not recipe.evaluate.external:
            yield Problem(
                what="The recipe names no external model.",
                where="--only external",
                why="evaluate.external is empty, so there is nothing to evaluate.",
                next="Write evaluate: {external: {NAME: FOLDER_OR_HUB_ID}}, or --set evaluate.external.NAME=FOLDER.",
            )
        elif name != EXTERNAL and name not in slugs:
            near = get_close_matches(name, slugs, n=1)
            yield Problem(
                what=f"The recipe has no arm {name}.",
                where=f"--only {name}",
                why=f"It has {', '.join(slugs)}.",
                next=f"Did you mean {near[0]}?" if near else "Name one of these, or `external`.",
            )


def fetched(loaded: Loaded, pins: Pins) -> Loaded:
    """The recipe with folders in place of hub ids, for what reads headers and rows; itself where all is local."""
    if not fetchable(loaded):
        return loaded
    recipe = loaded.recipe
    model = recipe.model.model_copy(update={"base": str(pins.base.path)})
    parts = [
        part.model_copy(update={"path": str(pinned.path)})
        for part, pinned in zip(recipe.data.parts, pins.data, strict=True)
    ]
    data = recipe.data.model_copy(update={"sources": parts} if recipe.data.sources else {"path": parts[0].path})
    train = recipe.train.model_copy(update={"adapter": str(pins.adapter.path)}) if pins.adapter else recipe.train
    external = {
        name: model.model_copy(update={"path": str(pins.externals[name].path)})
        for name, model in recipe.evaluate.externals.items()
    }
    evaluate = recipe.evaluate.model_copy(update={"external": external})
    sections = {"model": model, "data": data, "train": train, "evaluate": evaluate}
    return replace(loaded, recipe=recipe.model_copy(update=sections))
