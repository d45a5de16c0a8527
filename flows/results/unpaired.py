"""What two published scores on n questions can bear, where nobody says which questions each of them got right.

A paired comparison rests on the questions on which the two differ, m = (right, wrong) + (wrong, right). Two scores fix
the difference of these counts, d, and leave m open: at least |d| (the worse one is right nowhere else), and at most as
many as the wrong answers of both leave room for (Fréchet's bounds). An interval for each end is all that can be said.

The interval is Tango's score interval (score_interval.py). It leaves out zero exactly where McNemar's corrected test
does: (|d| - 1)^2 > z^2 m. At 95 % that is what McNemar's exact test decides: for m up to 2,000 the two differ for 17 of
a million pairs of m and d, whose exact p is from 0.0488 to 0.05 and which are not called shown. Both need six questions
that differ, all one way. So one number decides: the most questions that may differ; n less that is how many the two
have to agree on.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist
from typing import Literal, NamedTuple

from flows.results.score_interval import score_interval
from flows.results.stats import LEVEL, Interval, Z

Outcome = Literal["shown", "depends", "cannot"]


class Figure(NamedTuple):
    """A published number.

    Attributes:
        value: As a share, or as it is where it is a mean.
        step: One unit of its last digit, in the same scale.
        text: As it was written.
    """

    value: Decimal
    step: Decimal
    text: str


class Counted(NamedTuple):
    """How many of n questions a share means: the nearest whole number, and all that round to what was written.

    Attributes:
        whole: Some whole number does; else all three are the nearest one.
    """

    low: int
    nearest: int
    high: int
    whole: bool


class Verdict(NamedTuple):
    """What a difference of d questions among n can bear at one level.

    Attributes:
        agree: Questions on which the two have to agree at least, right or wrong; None where it does not depend on it.
        correlation: Of means: what the two have to correlate at least, row by row.
    """

    outcome: Outcome
    agree: int | None = None
    correlation: float | None = None


def counted(figure: Figure, n: int) -> Counted:
    """The whole numbers of n questions that a share can mean."""
    value, half = Fraction(figure.value), Fraction(figure.step) / 2
    near = round(value * n)
    low, high = math.ceil((value - half) * n), math.floor((value + half) * n)
    if low > high:  # not rounded; perhaps cut off
        low, high = math.ceil(value * n), math.ceil((value + 2 * half) * n) - 1
        near = min(max(near, low), high) if low <= high else near
    whole = low <= high
    least, most = (0, n) if value >= 0 else (-n, 0)
    near, low, high = (min(max(count, least), most) for count in ((near, low, high) if whole else (near, near, near)))
    return Counted(low, near, high, whole)


def discordant(x: int, y: int, n: int) -> tuple[int, int]:
    """Fewest and most questions on which models with x and y right answers of n can differ."""
    return abs(x - y), min(x + y, 2 * n - x - y)


def paired_interval(d: int, m: int, n: int, z: float = Z) -> Interval:
    """Of a difference of d questions where m of n differ; with the correction for continuity."""
    return score_interval((m + d) // 2, (m - d) // 2, n, z=z)


def judged(d: int, n: int, most: int, z: float = Z) -> Verdict:
    """Whether a difference of d questions can be shown, where at most so many of n differ."""
    limit = math.floor(((abs(d) - 1) / z) ** 2) if abs(d) > 1 else 0
    limit -= (limit - d) % 2  # as many differ as make d, and pairs of opposite ones
    if d == 0 or limit < abs(d):
        return Verdict("cannot")
    return Verdict("shown") if limit >= most else Verdict("depends", agree=n - limit)


def least_shown(z: float = Z) -> int:
    """Fewest questions that can show a difference: all of those that differ, and all one way."""
    return next(d for d in range(1, 10_000) if judged(d, 10**9, d, z).outcome != "cannot")


def together_z(rows: int) -> float:
    """Critical value of intervals that hold for so many rows at once (Bonferroni)."""
    return Z if rows == 1 else NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / rows)
