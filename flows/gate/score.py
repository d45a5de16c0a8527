"""Tango's score interval beside a task's bootstrap, and the rows that it asks for (flows/results/score_interval.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

from flows.results.flips import flips
from flows.results.paired import Paired
from flows.results.score_interval import score_interval
from flows.results.stats import Z_POWER, Interval, Studentized, student
from recipes.checks.power import HALF, score_variance


class Score(NamedTuple):
    """A candidate's answers beside another's, each of them right or wrong.

    Attributes:
        lost: Rows that only the other has right.
        gained: Rows that only the candidate has right.
        n: All rows.
        z: Standard errors to both sides, at the level that decides.
        wider: How many times larger the standard error over groups is than that of independent rows; at least 1.
        se: The standard error over groups.
    """

    lost: int
    gained: int
    n: int
    z: float
    wider: float
    se: float

    @classmethod
    def of(cls, pair: Paired, boot: Studentized, level: float) -> Score | None:
        """None where scores are graded, or sums of several answers."""
        counted = flips(pair)
        if isinstance(counted, str):
            return None
        lost, gained, n = counted.lost, counted.gained, len(pair.a.rows)
        apart = math.sqrt(lost + gained - (lost - gained) ** 2 / n) / n
        wider = max(1.0, boot.se / apart) if apart > 0 else 1.0
        return cls(lost, gained, n, student(pair.a.sums.effective, level), wider, boot.se)

    def with_bootstrap(self, own: Interval) -> Interval:
        """The hull of both intervals of candidate - other."""
        score = score_interval(self.gained, self.lost, self.n, z=self.z, inflated=self.wider, correction=HALF)
        return Interval(min(own.low, score.low), max(own.high, score.high))

    def needed(self, margin: float, room: float) -> float:
        """Rows at which it decides 4 times in 5, if answers keep changing as often.

        Args:
            margin: What may be lost.
            room: Distance from the estimate to the margin, above 0.
        """
        at_margin = max(0.0, score_variance(self.lost, self.gained, self.n, margin)) / self.n
        spread = self.z * self.wider * math.sqrt(at_margin) + Z_POWER * self.se * math.sqrt(self.n)
        root = (spread + math.sqrt(spread**2 + 4 * room * HALF)) / (2 * room)  # spread / root + HALF / root^2 = room
        return root**2
