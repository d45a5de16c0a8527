"""vet: everything that can be refused before GPU time is spent, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.compose import Pins, limits, pin
from flows.plan import Planned, plan
from flows.preflight import preflight
from recipes.check import check, check_data
from recipes.load import Loaded, load
from recipes.problem import RecipeError
from recipes.schema import Recipe
from tasks.runtime.store import Store


@dataclass(frozen=True, kw_only=True)
class Vetted:
    """A recipe that may run: pinned, planned, and small enough for this machine."""

    loaded: Loaded
    pins: Pins
    plan: list[Planned]
    preflight: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.recipe


def vet(path: Path, *, sets: Sequence[str], home: Path) -> Vetted:
    """Load, check, pin, plan and predict.

    Raises:
        RecipeError: Everything that is wrong, found by whichever check is the first to find anything.
    """
    loaded = load(path, sets=sets)
    if problems := [*check(loaded), *check_data(loaded).problems]:
        raise RecipeError(problems)
    pins = pin(loaded, home)
    planned = plan(loaded.recipe, pins, Store(home))
    predicted = preflight(loaded, planned, home=home, base=pins.base.path, limits=limits(loaded.recipe))
    return Vetted(loaded=loaded, pins=pins, plan=planned, preflight=predicted)
