"""Whether the gate can pass at all: how wide an interval the rows of test will allow, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from recipes.arms import arms
from recipes.checks.power import (
    DOMAIN_ROWS,
    FEWEST_GROUPS,
    GUESS,
    Rate,
    Scored,
    chance_to_pass,
    enough_rows,
    margin_that_does,
    reach_at,
)
from recipes.data.rows import Side
from recipes.problem import Problem, RecipeError
from recipes.schema import Recipe

HARDLY = 0.5  # less than an even chance to pass
WIDEST_ADVISED = 0.1  # five times the default: whoever may lose more than 10 points needs rows, and no wider margin


class SideSize(NamedTuple):
    """What the figures of a split rest on.

    Attributes:
        task: Rows with a prompt: plain texts have no task score.
        tokens: Of all rows, about: what losses are means of.
        domains: As `task`, by domain.
    """

    task: Scored
    tokens: Scored
    domains: Mapping[str, Scored]


def gate_warnings(recipe: Recipe, sizes: Mapping[Side, SideSize], *, rate: Rate = GUESS) -> Iterator[Problem]:
    """What keeps a candidate from passing that is no worse at all: too few rows, or too few groups of them.

    On test that keeps the gate from passing; on dev it keeps the rule from naming an arm that could try.

    Args:
        recipe: The recipe.
        sizes: Of dev and test.
        rate: How many answers change between a quantized model and the merged one.
    """
    test, dev = sizes["test"], sizes["dev"]
    problem = _few_groups(recipe, "test", test) or _few_rows(recipe, test.task, rate)
    yield from filter(None, [problem])
    yield from _domains(recipe, test.domains)
    if not recipe.promote.prefer:
        problem = _few_groups(recipe, "dev", dev) or _no_name(recipe, dev.task)
        yield from filter(None, [problem])


def _few_groups(recipe: Recipe, split: Side, size: SideSize) -> Problem | None:
    """No interval can be made of so few groups: every check would be undecided."""
    few = {unit: scored for unit, scored in (("rows", size.task), ("tokens", size.tokens)) if scored.too_few_groups}
    unit, scored = next(((unit, scored) for unit, scored in few.items() if scored.rows), ("", None))
    if scored is None:
        return None
    share = recipe.data.test if split == "test" else recipe.data.dev
    column, margin = recipe.data.group_column, recipe.gate.task
    kept = f"equal `{column}`" if column else "the same first question"
    held = f"; the largest holds {100 * scored.largest / scored.rows:.0f} % of the {unit}" if scored.is_lopsided else ""
    ends = "every check of the gate would be undecided" if split == "test" else "no scheme could be named for promotion"
    more = f"; {_groups_that_do(margin)} for a margin of {100 * margin:g} points" if size.task.rows else ""
    finer = "Or name a finer data.group, or draw" if column else "Or draw"
    other = "" if split == "test" else "; or name the arm yourself: promote.prefer"
    return Problem(
        what=f"Nothing can be promoted: {split} has {scored.too_few_groups}.",
        where=f"data.{split}",
        why=f"Rows with {kept} are one group, and stand or fall together{held}. So few groups say nothing of other "
        f"rows: {ends}.",
        next=f"Give rows of more groups of like size, so that {FEWEST_GROUPS} or more fall on {split} (data.{split} is "
        f"{share:g}{more}). {finer} again by another data.salt{other}.",
    )


def _few_rows(recipe: Recipe, scored: Scored, rate: Rate) -> Problem | None:
    """The task score's interval would be wider than the gate's margin even if nothing got worse."""
    margin = recipe.gate.task
    if not scored.rows or scored.too_few_groups:
        return None
    chance, room = chance_to_pass(scored, rate.variance, margin), reach_at(scored, 0.0, margin)
    if room >= margin:
        return Problem(
            what=f"The gate cannot pass: test has {scored.text}.",
            where="gate.task",
            why=f"{_even(room, margin)} `quench promote` would say undecided.",
            next=f"{more_rows(recipe, scored, margin, rate, split='test')}"
            f"{_or_margin(margin_that_does(scored, rate.variance))}.",
        )
    if chance >= HARDLY:
        return None
    reach = reach_at(scored, rate.variance, margin)
    return Problem(
        what=f"The gate can hardly pass: test has {scored.text}.",
        where="gate.task",
        why=f"{rate.text[:1].upper()}{rate.text[1:]}, a candidate that is truly equal passes {percent(chance)} of the "
        f"time: the interval of the task score reaches {points(reach)} towards the margin, which is "
        f"{100 * margin:g}. Else `quench promote` says undecided.",
        next=f"{more_rows(recipe, scored, margin, rate, split='test')}"
        f"{_or_margin(margin_that_does(scored, rate.variance))}: it then passes 4 times in 5.",
    )


def _no_name(recipe: Recipe, scored: Scored) -> Problem | None:
    """Even where no answer changes, no scheme is shown to be within the margin on dev."""
    margin = recipe.gate.task
    if not scored.rows or scored.too_few_groups or (room := reach_at(scored, 0.0, margin)) < margin:
        return None
    return Problem(
        what=f"No scheme can be named for promotion: dev has {scored.text}.",
        where="gate.task",
        why=f"{_even(room, margin)} The scheme that goes through the gate is one that is shown to be within the "
        "margins on dev.",
        next=f"{more_rows(recipe, scored, margin, Rate(0.0, 0.0, ''), split='dev')}"
        f"{_or_margin(margin_that_does(scored, 0.0))}, or name the arm yourself: promote.prefer.",
    )


def _domains(recipe: Recipe, domains: Mapping[str, Scored]) -> Iterator[Problem]:
    """A domain with enough rows to gate, and too few groups to pass."""
    gating = {name: scored for name, scored in domains.items() if scored.rows >= DOMAIN_ROWS and len(domains) > 1}
    margin = recipe.gate.domain_task
    for name, scored in gating.items():
        words = scored.too_few_groups
        if words is None and reach_at(scored, 0.0, margin) < margin:
            continue
        why = f"{_even(reach_at(scored, 0.0, margin), margin, field='gate.domain_task')} " if words is None else ""
        yield Problem(
            what=f"The gate cannot pass in the domain `{name}`: test has {scored.text} of it.",
            where="gate.domain_task",
            why=f"{why}From {DOMAIN_ROWS} rows on, a domain decides with the others"
            f"{f', and this one has {words}' if words else ''}.",
            next="Give rows of more groups of this domain"
            + ("" if words else _or_margin(margin_that_does(scored, 0.0), field="gate.domain_task"))
            + ". data.domain and `domain` of a source say what a domain is.",
        )


def general_warning(scored: Scored) -> Problem | None:
    """So few texts in the general hold-out that its check stays undecided."""
    words = scored.too_few_groups
    if words is None:
        return None
    return Problem(
        what=f"Nothing can be promoted: data.general has {words}.",
        where="data.general",
        why="Each text is one group. So few say nothing of other texts: the gate's check of the general loss would be "
        "undecided.",
        next="Give more texts, or leave data.general out: then forgetting is not measured, and gates nothing.",
    )


def document_problem(metric: str, documents: int, margin: float, *, where: str) -> Problem | None:
    """An lm-eval entry with so few documents that no candidate that is only equal passes; None where one can.

    Args:
        metric: `task.NAME`.
        documents: How many are asked.
        margin: `gate.task`.
        where: Its field.
    """
    scored = Scored.apart(documents)
    if documents >= FEWEST_GROUPS and reach_at(scored, 0.0, margin) < margin:
        return None
    words = scored.too_few_groups
    why = f"It has {words}." if words else _even(reach_at(scored, 0.0, margin), margin)
    return Problem(
        what=f"The gate cannot pass: {metric} has {documents:,} document{'' if documents == 1 else 's'}.",
        where=where,
        why=f"{why} `quench promote` would say undecided.",
        next=f"Let it ask {_groups_that_do(margin)} documents or more (a higher `limit`, or further tasks in one entry)"
        + ("" if words else _or_margin(margin_that_does(scored, 0.0)))
        + ", or leave the entry out.",
    )


def more_rows(recipe: Recipe, scored: Scored, margin: float, rate: Rate, *, split: Side) -> str:
    """`Give data of which about 990 rows fall on test (6,600 in all, while data.test is 0.15)`."""
    share = recipe.data.test if split == "test" else recipe.data.dev
    enough = enough_rows(margin, rate.variance, each=scored.rows / scored.effective)
    if enough is None:
        return f"Give more rows (ten million on {split} would not do)"
    groups = "" if scored.effective > scored.rows - 0.5 else ", in groups like these"
    return (
        f"Give data of which about {enough:,} rows fall on {split}{groups} ({_rounded(enough / share):,} in all, while "
        f"data.{split} is {share:g})"
    )


def _groups_that_do(margin: float) -> str:
    """Groups, or documents, with which a candidate passes that gives the very same answers."""
    enough = enough_rows(margin, 0.0)
    return "more than ten million" if enough is None else f"{enough:,}"


def _even(room: float, margin: float, *, field: str = "the margin") -> str:
    """What so few groups leave open."""
    return (
        f"Even where no answer changes, the interval of the task score reaches {points(room)} to each side, and "
        f"{field} is {100 * margin:g}: only a candidate that is better could pass."
    )


def points(share: float) -> str:
    """`2.3 points`."""
    return f"{100 * share:.1f} points"


def percent(share: float) -> str:
    """`37 %`; nothing is promised for sure."""
    return "less than 1 %" if share < 0.01 else "more than 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def _or_margin(half: float, *, field: str = "gate.task") -> str:
    """`, or set gate.task to 0.027 or more`; nothing where that would let much worse ones pass, too."""
    return f", or set {field} to {math.ceil(1000 * half + 1) / 1000:g} or more" if half <= WIDEST_ADVISED else ""


def _rounded(rows: float) -> int:
    """To two digits, upwards."""
    unit = 10 ** max(0, math.floor(math.log10(rows)) - 1)
    return math.ceil(rows / unit) * unit


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
