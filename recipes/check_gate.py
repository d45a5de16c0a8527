"""Whether the gate can pass at all: how wide an interval the rows of test will allow, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from recipes.arms import arms
from recipes.problem import Problem, RecipeError
from recipes.rows import Row, content_hash
from recipes.schema import Recipe

CHANGED = 0.05  # share of the answers that turn from right to wrong or back between two models: an assumption
Z = 1.96
NONE_CHANGED = 3.7  # over the number of groups: no interval of flows/stats.py is narrower (rule of three, two-sided)


def gate_warnings(recipe: Recipe, test: Sequence[Row]) -> Iterator[Problem]:
    """The task score's interval would be wider than the gate's margin even if nothing got worse.

    Args:
        recipe: The recipe.
        test: Rows that fall on test. Plain texts have no task score; how a loss varies is not known beforehand.
    """
    asked = [row for row in test if not row.is_text]
    if not asked:
        return
    column = recipe.data.group
    groups = len({str(row.columns[column]) if column else content_hash(row.messages) for row in asked})
    margin, half = recipe.gate.task, half_width(len(asked), groups)
    if half < margin:
        return
    enough = enough_rows(margin, each=len(asked) / groups)
    yield Problem(
        what=f"The gate can hardly pass: test has {len(asked):,} rows in {groups:,} groups.",
        where="gate.task",
        why=f"Where {100 * CHANGED:g} % of the answers change, the interval of the task score will reach "
        f"{100 * half:.1f} points to each side; the margin is {100 * margin:g}. `quench promote` would say undecided.",
        next=f"Give data of which about {enough:,} rows fall on test (data.test is {recipe.data.test:g}), or set "
        f"gate.task to more than {100 * half:.1f} points ({_above(half):g}).",
    )


def half_width(rows: int, groups: int) -> float:
    """Of the 95 % interval of a difference in task score, where rows of a group change independently (at best)."""
    return max(Z * math.sqrt(CHANGED / rows), NONE_CHANGED / groups)


def enough_rows(margin: float, *, each: float) -> int:
    """Rows of test with which the interval is narrower than the margin. each: rows a group."""
    return math.floor(max(CHANGED * (Z / margin) ** 2, each * NONE_CHANGED / margin)) + 1


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
