"""Whether the gate can pass at all: how wide an interval the rows of test will allow, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from recipes.arms import arms
from recipes.data.rows import Row, Side, content_hash
from recipes.problem import Problem, RecipeError
from recipes.schema import Recipe

CHANGED = 0.05  # share of the answers that turn from right to wrong or back between two models: an assumption
Z = 1.96
# Over the number of groups: no interval of flows/results/stats.py is narrower (rule of three, two-sided).
NONE_CHANGED = 3.7


class Said(NamedTuple):
    """What few rows of a split come to, where a share of the answers changes."""

    what: str
    where: str
    outcome: str
    otherwise: str
    changed: float


SAID: dict[Side, Said] = {
    "test": Said(
        "The gate can hardly pass",
        f"Where {100 * CHANGED:g} % of the answers change",
        "`quench promote` would say undecided.",
        "",
        CHANGED,
    ),
    "dev": Said(
        "No scheme can be named for promotion",
        "Even where no answer changes",
        "The scheme that goes through the gate is one that is shown to be within the margins on dev.",
        ", or name the arm yourself: promote.prefer",
        0.0,
    ),
}


def gate_warnings(recipe: Recipe, sides: Mapping[Side, Sequence[Row]]) -> Iterator[Problem]:
    """The task score's interval would be wider than the gate's margin even if nothing got worse.

    On test that keeps the gate from passing; on dev it keeps the rule from naming an arm that could try.

    Args:
        recipe: The recipe.
        sides: Rows by split. Plain texts have no task score; how a loss varies is not known beforehand.
    """
    margin = recipe.gate.task
    for split, said in SAID.items():
        if split == "dev" and recipe.promote.prefer:
            continue
        asked = [row for row in sides[split] if not row.is_text]
        column = recipe.data.group
        groups = len({str(row.columns[column]) if column else content_hash(row.messages) for row in asked})
        if not groups or (half := half_width(len(asked), groups, changed=said.changed)) < margin:
            continue
        enough = enough_rows(margin, each=len(asked) / groups, changed=said.changed)
        share = recipe.data.test if split == "test" else recipe.data.dev
        yield Problem(
            what=f"{said.what}: {split} has {len(asked):,} rows in {groups:,} groups.",
            where="gate.task",
            why=f"{said.where}, the interval of the task score will reach "
            f"{100 * half:.1f} points to each side; the margin is {100 * margin:g}. {said.outcome}",
            next=f"Give data of which about {enough:,} rows fall on {split} (data.{split} is {share:g}), or set "
            f"gate.task to more than {100 * half:.1f} points ({_above(half):g}){said.otherwise}.",
        )


def half_width(rows: int, groups: int, *, changed: float = CHANGED) -> float:
    """Of the 95 % interval of a difference in task score, where rows of a group change independently (at best)."""
    return max(Z * math.sqrt(changed / rows), NONE_CHANGED / groups)


def enough_rows(margin: float, *, each: float, changed: float = CHANGED) -> int:
    """Rows of test with which the interval is narrower than the margin. each: rows a group."""
    return math.floor(max(changed * (Z / margin) ** 2, each * NONE_CHANGED / margin)) + 1


def _above(half: float) -> float:
    return math.ceil(1000 * half + 1) / 1000


def preferred(recipe: Recipe) -> Iterator[Problem]:
    """promote.prefer names an arm that is one artifact of this recipe."""
    named = recipe.promote.prefer
    try:
        every = arms(recipe) if named else ()
    except RecipeError:
        return  # check says so
    able = [
        one.slug
        for one in every
        if one.merge_base and not one.is_control and one.kv is None and one.unavailable is None
    ]
    if named and named not in able:
        known = any(one.slug == named for one in every)
        yield Problem(
            what=f"{named} cannot be promoted." if known else f"The matrix has no arm {named}.",
            where="promote.prefer",
            why="What is promoted is one artifact of this run: a scheme on the merged model, or the merged model; no "
            "adapter on a base, no control, and no KV cache, which is a setting of the server.",
            next=f"Write one of {', '.join(able)}, or leave it out.",
        )
