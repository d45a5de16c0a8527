"""Tango's score interval of a difference of paired shares (1998, Statistics in Medicine 17:891).

The standard error is that of the difference in question, not the estimated one. With few questions that differ this
matters: a candidate that loses few of them by luck has a small estimated error as well, and its interval is too short
just then. At a margin of 2 points, where nearly every changed answer is a lost one, an interval at 99.9 % with the
estimated error misses ten times as often as it says (docs/results/gate.md).
"""

from __future__ import annotations

import math

from flows.results.stats import Interval, Z
from recipes.checks.power import score_variance

STEPS = 60  # halvings of [-1, 1]: below the last bit of a float


def score_interval(
    ahead: int, behind: int, n: int, *, z: float = Z, inflated: float = 1.0, correction: float = 1.0
) -> Interval:
    """Of (ahead - behind) / n.

    Args:
        ahead: Questions that only the first has right.
        behind: Questions that only the second has right.
        n: All questions.
        z: Standard errors to both sides.
        inflated: How many times larger the standard error is than that of independent questions (groups of rows).
        correction: For continuity: so many questions count against every difference.
    """
    far = z * inflated
    low, high = (_lower_end(*pair, n, far, correction) for pair in ((ahead, behind), (behind, ahead)))
    return Interval(low, -high)


def _lower_end(ahead: int, behind: int, n: int, z: float, correction: float) -> float:
    """The smallest difference that the counts do not speak against, by halving."""
    low, high = -1.0, (ahead - behind) / n
    for _ in range(STEPS):
        middle = (low + high) / 2
        off = ahead - behind - n * middle - correction
        if off > z * math.sqrt(max(score_variance(ahead, behind, n, middle), 0.0)):
            low = middle
        else:
            high = middle
    return low
