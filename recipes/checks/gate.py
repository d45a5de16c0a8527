"""Whether the gate can pass at all: how wide an interval the rows of test will allow, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from recipes.arms import arms
from recipes.data.rows import Side
from recipes.problem import Problem, RecipeError
from recipes.schema import Recipe

CHANGED = 0.05  # share of the answers that turn from right to wrong or back between two models: an assumption
Z = 1.96
# Over the number of groups: no interval of flows/results/stats.py is narrower (rule of three, two-sided).
NONE_CHANGED = 3.7


class TooFew(NamedTuple):
    """What it means that a split has few rows, where a share of the answers changes: the parts of a warning."""

    what: str
    where: str
    outcome: str
    otherwise: str
    changed: float


TOO_FEW: dict[Side, TooFew] = {
    "test": TooFew(
        "The gate can hardly pass",
        f"Where {100 * CHANGED:g} % of the answers change",
        "`quench promote` would say undecided.",
        "",
        CHANGED,
    ),
    "dev": TooFew(
        "No scheme can be named for promotion",
        "Even where no answer changes",
        "The scheme that goes through the gate is one that is shown to be within the margins on dev.",
        ", or name the arm yourself: promote.prefer",
        0.0,
    ),
}


class SplitSize(NamedTuple):
    """How many rows of a split have a prompt (plain texts have no task score), in how many groups."""

    rows: int
    groups: int


def gate_warnings(recipe: Recipe, sizes: Mapping[Side, SplitSize]) -> Iterator[Problem]:
    """The task score's interval would be wider than the gate's margin even if nothing got worse.

    On test that keeps the gate from passing; on dev it keeps the rule from naming an arm that could try.

    Args:
        recipe: The recipe.
        sizes: By split. How a loss varies is not known beforehand, so nothing is said of plain texts.
    """
    margin = recipe.gate.task
    for split, words in TOO_FEW.items():
        if split == "dev" and recipe.promote.prefer:
            continue
        rows, groups = sizes[split]
        if not groups or (half := half_width(rows, groups, changed=words.changed)) < margin:
            continue
        enough = enough_rows(margin, each=rows / groups, changed=words.changed)
        share = recipe.data.test if split == "test" else recipe.data.dev
        yield Problem(
            what=f"{words.what}: {split} has {rows:,} rows in {groups:,} groups.",
            where="gate.task",
            why=f"{words.where}, the interval of the task score will reach "
            f"{100 * half:.1f} points to each side; the margin is {100 * margin:g}. {words.outcome}",
            next=f"Give data of which about {enough:,} rows fall on {split} (data.{split} is {share:g}), or set "
            f"gate.task to more than {100 * half:.1f} points ({_above(half):g}){words.otherwise}.",
        )


def half_width(rows: int, groups: int, *, changed: float = CHANGED) -> float:
    """Of the 95 % interval of a difference in task score, where rows of a group change independently (at best)."""
    return max(Z * math.sqrt(changed / rows), NONE_CHANGED / groups)


def enough_rows(margin: float, *, each: float, changed: float = CHANGED) -> int:
    """Rows with which the interval is narrower than the margin; `each` group has so many rows."""
    return math.floor(max(changed * (Z / margin) ** 2, each * NONE_CHANGED / margin)) + 1


def _above(half: float) -> float:
    return math.ceil(1000 * half + 1) / 1000


def prefer_problems(recipe: Recipe) -> Iterator[Problem]:
    """promote.prefer names an arm that is no artifact of this recipe."""
    slug = recipe.promote.prefer
    if not slug:
        return
    try:
        matrix = arms(recipe)
    except RecipeError:
        return  # check reports it
    able = [
        arm.slug
        for arm in matrix
        if arm.merge_base and not arm.is_control and arm.of is None and arm.unavailable is None
    ]
    if slug not in able:
        known = any(arm.slug == slug for arm in matrix)
        yield Problem(
            what=f"{slug} cannot be promoted." if known else f"The matrix has no arm {slug}.",
            where="promote.prefer",
            why="What is promoted is one artifact of this run: a scheme on the merged model, or the merged model; no "
            "adapter on a base, no control, and no KV cache, which is a setting of the server.",
            next=f"Write one of {', '.join(able)}, or leave it out.",
        )
