"""An arm as it is named on the command line: found in its run, with what was made of it."""

from __future__ import annotations

from difflib import get_close_matches

from flows.results.read import Run, RunArm
from recipes.problem import Problem


def named_arm(run: Run, slug: str) -> RunArm:
    """The arm of this name.

    Raises:
        RecipeError: The run has none.
    """
    if arm := run.arm(slug):
        return arm
    slugs = [arm.slug for arm in run.arms]
    near = get_close_matches(slug, slugs, n=1)
    raise Problem(
        what=f"The run has no arm {slug}.",
        where=str(run.folder),
        why=f"It has {', '.join(slugs) or 'none'}.",
        next=f"Did you mean {near[0]}?" if near else "Name one of these.",
    ).error()


def unmade(run: Run, arm: RunArm) -> Problem | None:
    """Why the files that an arm is loaded from are not there; None where they are, or where it needs none of a run."""
    where = str(run.folder)
    if arm.unavailable:
        return Problem(
            what=f"{arm.slug} cannot be made.", where=where, why=f"{arm.unavailable}.", next="Name another arm."
        )
    for key in (arm.model, arm.adapter):
        step = run.step(key)
        if key is None or (step is not None and step.ok):
            continue
        return Problem(
            what=f"{arm.slug} was not made.",
            where=where,
            why=f"{step.trouble if step else 'the run ended before it was made'}.",
            next="Fix that, and run its recipe again: quench run.",
        )
    return None
