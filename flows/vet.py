"""vet: everything that can be refused before GPU time is spent, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.compose import Pins, fetchable, limits, pin
from flows.plan import Planned, plan
from flows.preflight import preflight
from recipes.check import check, check_data, load_and_read
from recipes.check_serving import warnings
from recipes.load import Loaded
from recipes.problem import Problem, RecipeError
from recipes.schema import Recipe
from tasks.runtime.store import Store


@dataclass(frozen=True, kw_only=True)
class Vetted:
    """A recipe that may run: pinned, planned, and small enough for this machine; and what it will not come to.

    Attributes:
        warnings: What serve.engine would refuse, and a test set that is too small for the gate.
    """

    loaded: Loaded
    pins: Pins
    plan: list[Planned]
    preflight: dict[str, Any]
    warnings: list[Problem]

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.recipe


def vet(path: Path, *, sets: Sequence[str], home: Path) -> Vetted:
    """Load, check, pin, plan and predict.

    Raises:
        RecipeError: Everything that is wrong with recipe, base and rows; else with what they need of this machine.
    """
    loaded, rows = load_and_read(path, sets=sets)
    pins = pin(loaded, home)
    here = fetched(loaded, pins)
    if here is not loaded:
        rows = check_data(here)
        if problems := [*check(here), *rows.problems]:
            raise RecipeError(problems)
    planned = plan(loaded.recipe, pins, Store(home))
    predicted = preflight(here, planned, home=home, base=pins.base.path, limits=limits(loaded.recipe))
    return Vetted(
        loaded=loaded, pins=pins, plan=planned, preflight=predicted, warnings=[*warnings(here), *rows.warnings]
    )


def fetched(loaded: Loaded, pins: Pins) -> Loaded:
    """The recipe with folders in place of hub ids, for what reads headers and rows; itself where all is local."""
    if not fetchable(loaded):
        return loaded
    recipe = loaded.recipe
    model = recipe.model.model_copy(update={"base": str(pins.base.path)})
    parts = [
        part.model_copy(update={"path": str(one.path)}) for part, one in zip(recipe.data.parts, pins.data, strict=True)
    ]
    data = recipe.data.model_copy(update={"sources": parts} if recipe.data.sources else {"path": parts[0].path})
    train = recipe.train.model_copy(update={"adapter": str(pins.adapter.path)}) if pins.adapter else recipe.train
    return replace(loaded, recipe=recipe.model_copy(update={"model": model, "data": data, "train": train}))
