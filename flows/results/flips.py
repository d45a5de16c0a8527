"""How many answers turned from right to wrong, and how many from wrong to right, with McNemar's exact test.

The counts say what a difference of scores is made of: 0 points may be no change, or 40 answers lost and 40 gained. The
test takes every row for itself. Where a group has several rows its p is too small, and the interval over groups is
what decides, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtr

from flows.results.paired import Paired

GRADED = "scores between 0 and 1: no answer is simply right or wrong"
SUMMED = "a line of scores is the sum of several answers"


class Flips(NamedTuple):
    """Of a pair a, b: answers that only b has right, and answers that only a has right.

    Attributes:
        p: McNemar's exact p, two-sided: a flip falls on either side with one half where neither is better.
    """

    lost: int
    gained: int
    p: float


def flips(pair: Paired) -> Flips | str:
    """Count them; or why they cannot be counted."""
    if not (np.asarray(pair.a.count) == 1).all():
        return SUMMED
    if not (pair.a.binary and pair.b.binary):
        return GRADED
    lost, gained = (int((one.total > other.total).sum()) for one, other in ((pair.b, pair.a), (pair.a, pair.b)))
    return Flips(lost, gained, mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p: the chance of a split at least as uneven among so many flips, each side with one half."""
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def flips_json(pair: Paired) -> dict[str, Any]:
    """`flips` of report.json: lost, gained and p, or the reason why there are none."""
    counted = flips(pair)
    if isinstance(counted, str):
        return {"lost": None, "gained": None, "p": None, "reason": counted}
    return {**counted._asdict(), "reason": None}


def swapped_flips(line: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same from b's side."""
    return line and {**line, "lost": line["gained"], "gained": line["lost"]}


def flips_text(line: dict[str, Any] | None) -> str:
    """`9 answers lost, 5 gained, p = 0.42`; empty where none were counted."""
    if not line or line["reason"]:
        return ""
    lost, gained = line["lost"], line["gained"]
    if lost + gained == 0:
        return "no answer flipped"
    p = "p < 0.0001" if line["p"] < 0.0001 else f"p = {line['p']:.2g}"
    return f"{lost:,} answer{'' if lost == 1 else 's'} lost, {gained:,} gained, {p}"


def flips_note(report: Mapping[str, Any]) -> str | None:
    """What the counts of flipped answers are; None where none were counted."""
    if not any(flips_text(one.get("flips")) for one in report["comparisons"]):
        return None
    size = report["data"].get("test")
    grouped = (
        f", and these {size['rows']:,} are {size['groups']:,} groups" if size and size["rows"] > size["groups"] else ""
    )
    return (
        "Answers lost: b has them right and a has not; gained: the other way round. p is McNemar's exact test, "
        f"two-sided, of this one comparison. It takes every row for itself{grouped}; the interval is what decides."
    )
