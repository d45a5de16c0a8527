"""vet: everything that can be refused before GPU time is spent, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.compose import Pins, limits, pin
from flows.plan import Planned, plan
from flows.preflight import preflight
from recipes.check import check_adapter, check_base, load_and_check
from recipes.load import Loaded
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
        RecipeError: Everything that is wrong with recipe, base and rows; else with what they need of this machine.
    """
    loaded = load_and_check(path, sets=sets, data=True)
    pins = pin(loaded, home)
    if loaded.base is None and (problems := check_base(loaded, pins.base.path)):  # a hub id: it is here only now
        raise RecipeError([loaded.placed(one) for one in problems])
    if (
        pins.adapter
        and loaded.adapter is None
        and (problems := check_adapter(loaded, pins.adapter.path, base=pins.base.path))
    ):
        raise RecipeError(problems)
    planned = plan(loaded.recipe, pins, Store(home))
    predicted = preflight(loaded, planned, home=home, base=pins.base.path, limits=limits(loaded.recipe))
    return Vetted(loaded=loaded, pins=pins, plan=planned, preflight=predicted)
