"""How many test rows would show a loss of the task score that matters: planned from the rows that were scored.

Power is that of one comparison at 95 %, two-sided and not adjusted for a family: the number for the arm that one means
to ship, not for all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flows.results.cells import ArmEvidence
from flows.results.comparisons import merged_schemes
from flows.results.paired import Obstacle, Paired, paired, why_not
from flows.results.rows import RowScores
from flows.results.stats import Z_POWER, Estimand, Z, standard_error

LOSS = 0.03  # of the task score: 3 points
POWER = 0.8  # flows.results.stats.Z_POWER is its quantile


class Needed(NamedTuple):
    """Rows and groups of test that would show the loss."""

    rows: int
    groups: int


def needed(a: RowScores, b: RowScores, *, loss: float = LOSS) -> Needed:
    """Rows at which `a`, were it worse than `b` by `loss`, would be called different with 80 % probability.

    The variance of the difference is the observed one between groups, and what the loss itself adds: rows that turn
    from right to wrong, each on its own, add loss * (1 - loss) a row. Two arms that agree on every row would otherwise
    need no rows at all. For scores between 0 and 1 other than right and wrong that is an upper bound.

    Args:
        a: Scores between 0 and 1 of the arm, one row per row.
        b: The same rows of the arm that it is compared with.
        loss: The difference in the mean score that must not pass unseen.
    """
    groups, rows = len(a.groups), float(a.count.sum())
    observed = standard_error(Estimand(a.sums, b.sums)) ** 2 * groups  # variance of one group's share
    planted = loss * (1 - loss) * groups / rows
    wanted = max(2, math.ceil((observed + planted) * ((Z + Z_POWER) / loss) ** 2))
    return Needed(rows=math.ceil(wanted * rows / groups), groups=wanted)


class Changed(NamedTuple):
    """How far two arms' scores differ: what the next run's registration starts from (flows/plan/registered.py).

    Attributes:
        share: Of the rows, those with another score.
        variance: Of one row's difference, by the spread between groups: as the share where rows change one by one.
    """

    share: float
    variance: float


def changed(a: RowScores, b: RowScores) -> Changed:
    """Of two arms on the same rows."""
    variance = standard_error(Estimand(a.sums, b.sums)) ** 2 * float(a.count.sum())
    return Changed(share=float((a.total != b.total).mean()), variance=variance)


def power(evidence: Mapping[str, ArmEvidence]) -> list[dict[str, Any]]:
    """`power` of report.json: every scheme against the merged model that it was made from."""
    return [
        _plan(evidence, arm.slug, f"merged-{arm.merge_base}")
        for arm in merged_schemes([arm.arm for arm in evidence.values()])
    ]


def _plan(evidence: Mapping[str, ArmEvidence], a: str, b: str) -> dict[str, Any]:
    scored = [evidence[slug].scores.get("task") if slug in evidence else None for slug in (a, b)]
    first, second = scored
    pair = paired(first, second)
    need = needed(pair.a, pair.b) if isinstance(pair, Paired) else None
    change = changed(pair.a, pair.b) if isinstance(pair, Paired) else None
    return {
        "metric": "task",
        "loss": LOSS,
        "power": POWER,
        "arm": a,
        "against": b,
        "rows_needed": need and need.rows,
        "groups_needed": need and need.groups,
        "rows": len(first.rows) if first else 0,
        "groups": len(first.groups) if first else 0,
        "changed": change and change.share,
        "variance": change and change.variance,
        "reason": None if isinstance(pair, Paired) else _reason(pair, a, b, scored),
    }


def _reason(obstacle: Obstacle, a: str, b: str, scored: Sequence[RowScores | None]) -> str:
    """Why there is no plan, in words."""
    missing = [slug for slug, rows in zip((a, b), scored, strict=True) if rows is None]
    own: dict[Obstacle, str] = {
        "missing": f"{' and '.join(missing)}: no task scores",
        "other rows": "the two arms were not scored on the same rows",
    }
    return why_not(obstacle, scored[0], own)


def sentence(plans: list[dict[str, Any]]) -> str | None:
    """What the report says about it; None where nothing could be planned."""
    known = [plan for plan in plans if plan["reason"] is None]
    if not known:
        return None
    least, most = (pick(known, key=lambda plan: plan["rows_needed"]) for pick in (min, max))
    span = f"{most['rows_needed']:,} rows ({most['arm']})"
    if least["rows_needed"] != most["rows_needed"]:
        span = f"{least['rows_needed']:,} rows ({least['arm']}) to {span}"
    enough = sum(plan["rows_needed"] <= plan["rows"] for plan in known)
    return (
        f"To show a loss of {100 * LOSS:.0f} points of task score with {100 * POWER:.0f} % probability, in one "
        f"comparison with the merged model at 95 %, test needs {span}; it has {most['rows']:,}, enough for {enough} of "
        f"{len(known)} schemes."
    )
