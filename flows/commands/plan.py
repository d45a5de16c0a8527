"""`quench plan`: every step of a recipe as hit or make, and why; or what it would take on another machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from flows.commands.terminal import DONE, FAILED, Output, warn
from flows.plan.card import plan_for, text
from flows.plan.critical import sentence
from flows.plan.history import same_recipe
from flows.plan.lookup import Planned
from flows.plan.machine import Memory, named
from flows.plan.validate import validate
from recipes.arms import FLOOR
from tasks.runtime.store.local import find_home


def command(args: argparse.Namespace) -> Output:
    """Look every step up, or predict it for another machine; nothing is started.

    Raises:
        RecipeError: Everything that would keep the recipe from running here; with --gpu-gib, anywhere.
    """
    if machine := named(args.gpu_gib, gpus=args.gpus, host_gib=args.host_gib):
        return _elsewhere(args, machine)
    home = find_home()
    validated = validate(args.recipe, sets=args.set, home=home, only=args.only)
    warn(validated.warnings)
    steps, pins = validated.plan, validated.pins
    outside = (pins.base, *pins.data, *pins.externals.values())
    commits = [f"pin   {pinned.name:<34} {pinned.source}" for pinned in outside if "@" in pinned.source]
    hits = sum(step.hit for step in steps)
    told = [f"{hits} of {len(steps)} steps are in the store", *_null_arms(steps)]
    told += filter(None, [sentence(steps, same_recipe(home, validated.recipe.name))])
    told += [] if args.only else validated.registered["text"]
    return Output(json=[vars(step) for step in steps], text="\n".join([*commits, *map(str, steps), *told]))


def _null_arms(steps: Sequence[Planned]) -> Iterator[str]:
    """What the null arms cost, where some are to be made."""
    scored = [step for step in steps if step.key.startswith("evaluate/")]
    nulls = [step for step in scored if f"{FLOOR}.null-" in step.key]
    if any(not step.hit for step in nulls):
        yield (
            f"{len(nulls)} of {len(scored)} evaluations compute {FLOOR} in another way, to show noise of arithmetic; "
            "`evaluate.null_arms: []` leaves them out"
        )


def _elsewhere(args: argparse.Namespace, machine: Memory) -> Output:
    """Exit code 1 where a step fits with no setting."""
    plan = plan_for(args.recipe, machine, sets=args.set, only=args.only, home=find_home())
    warn(plan.warnings)
    return Output(json=plan.as_dict(), text=text(plan), code=FAILED if plan.never else DONE)
