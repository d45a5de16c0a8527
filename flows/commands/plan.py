"""`quench plan`: every step of a recipe as hit or make, and why."""

from __future__ import annotations

import argparse

from flows.commands.terminal import Output, warn
from flows.plan.validate import validate
from tasks.runtime.store.local import find_home


def command(args: argparse.Namespace) -> Output:
    """Look every step up; nothing is started.

    Raises:
        RecipeError: Everything that would keep the recipe from running here.
    """
    validated = validate(args.recipe, sets=args.set, home=find_home(), only=args.only)
    warn(validated.warnings)
    steps, pins = validated.plan, validated.pins
    outside = (pins.base, *pins.data, *pins.externals.values())
    commits = [f"pin   {pinned.name:<34} {pinned.source}" for pinned in outside if "@" in pinned.source]
    hits = sum(step.hit for step in steps)
    return Output(
        json=[vars(step) for step in steps],
        text="\n".join([*commits, *map(str, steps), f"{hits} of {len(steps)} steps are in the store"]),
    )
