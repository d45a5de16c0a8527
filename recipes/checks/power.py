"""What so many scored rows can show, before anything is spent: arithmetic with the formulas of the gate's intervals.

Of a difference of two task scores on the same rows, `variance` is that of one row: where rows change from right to
wrong and back each on its own, the share of the rows that change. All intervals are those of one comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95  # two-sided
POWER = 0.8
# Share of the answers that turn from right to wrong or back between two models, where no earlier run tells: a guess. On
# the quickstart's 714 rows the 95 % intervals between two quantizations of one fine-tune reach 1.0 (8 bits and bf16)
# to 2.0 points (4 bits and NF4) to each side (docs/results/folklore.md): such widths come of 2 to 7 % of the answers.
GUESSED = 0.05
# Of equal size. Where fewer carry the figures no verdict is given: t with three degrees asks for 3.2 standard errors,
# and what it promises rests on the shape of the groups' noise, which so few do not show.
FEWEST_GROUPS = 5
TOO_FEW_GROUPS = "too few groups"
DOMAIN_ROWS = 200  # a slice by domain with fewer is shown and gates nothing
# Of a question, the binomial's usual correction for continuity. Without it 5.3 % of the years of docs/results/gate.md
# promote one candidate at the margin's edge in the worst cell, where 5 % is the goal (400 years); with it 4.8 %.
HALF = 0.5
MOST_ROWS = 10_000_000  # more only says: never
_NORMAL = NormalDist()
Z_POWER = _NORMAL.inv_cdf(POWER)


def too_few_groups(groups: int, effective: float) -> str:
    """Why so few groups have no interval: `too few groups: 20, which count as 3.8 of equal size; 5 are needed`.

    Args:
        groups: How many there are.
        effective: How many of equal size they count as.
    """
    if groups < 2:
        return f"{TOO_FEW_GROUPS}: {'one, so nothing can be said about the spread' if groups else 'none'}"
    lopsided = f", which count as {effective:.1f} of equal size" if effective < groups - 0.05 else ""
    return f"{TOO_FEW_GROUPS}: {groups}{lopsided}; {FEWEST_GROUPS} are needed"


class Scored(NamedTuple):
    """Rows that a score is the mean of, and the groups in which they stand or fall together.

    Attributes:
        rows: How many.
        groups: In how many groups.
        effective: As how many groups of equal size those count: (sum n)^2 / sum n^2.
        largest: Rows of the largest group.
    """

    rows: int
    groups: int
    effective: float
    largest: int = 1

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Scored:
        """From the number of rows (or tokens) of each group."""
        counts = [size for size in sizes if size]
        total = sum(counts)
        if not counts:
            return cls(0, 0, 0.0, 0)
        return cls(total, len(counts), total**2 / sum(count**2 for count in counts), max(counts))

    @classmethod
    def apart(cls, rows: int) -> Scored:
        """Each row is a group of its own."""
        return cls(rows, rows, float(rows))

    @property
    def is_lopsided(self) -> bool:
        """Groups are not of one size."""
        return self.effective < self.groups - 0.05

    @property
    def too_few_groups(self) -> str | None:
        """Why these groups have no interval; None where they have one."""
        enough = self.groups != 1 and self.effective >= FEWEST_GROUPS
        return None if enough else too_few_groups(self.groups, self.effective)

    @property
    def text(self) -> str:
        """`714 rows in 357 groups`."""
        return f"{self.rows:,} row{'' if self.rows == 1 else 's'} in {self.groups:,} group{'s'[: self.groups != 1]}"


class Rate(NamedTuple):
    """How often the answers of two models differ.

    Attributes:
        changed: Share of the rows on which their scores do.
        variance: Of one row's difference; more than that share where rows of a group change together.
        source: Where it comes from, in words.
    """

    changed: float
    variance: float
    source: str

    @property
    def text(self) -> str:
        """`where 5 % of the answers change (a guess)`."""
        return f"where {100 * self.changed:.2g} % of the answers change ({self.source})"


GUESS = Rate(GUESSED, GUESSED, "a guess")


def least(scored: Scored, level: float = LEVEL) -> float:
    """Half-width of the interval where no row changes: so many groups leave room for that much (rule of three)."""
    return 1 - ((1 - level) / 2) ** (1 / scored.effective)


def half_width(scored: Scored, variance: float, level: float = LEVEL) -> float:
    """Of the interval of a difference in task score.

    Raises:
        ValueError: Too few groups have no interval.
    """
    return max(_critical(scored, level) * math.sqrt(variance / scored.rows), least(scored, level))


def smallest_loss(scored: Scored, variance: float) -> float:
    """The loss of task score that is called a difference 4 times in 5; 1 where none is.

    As in flows/results/power.py it adds to the variance what it is itself: rows that turn from right to wrong.

    Raises:
        ValueError: Too few groups have no interval.
    """
    critical, room = _critical(scored, LEVEL), least(scored)

    def is_shown(loss: float) -> bool:
        error = math.sqrt((variance + loss * (1 - loss)) / scored.rows)
        return loss >= max(critical * error, room) + Z_POWER * error

    low, high = 0.0, 1.0
    if not is_shown(high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if is_shown(middle) else (middle, high)
    return high


def reach_at(scored: Scored, variance: float, margin: float, level: float = LEVEL) -> float:
    """How far from the margin a candidate has to be to pass it: the wider of the two intervals that the gate takes.

    The second is Tango's score interval with the variance at the margin (flows/results/score_interval.py), here of as
    many answers lost as gained; it counts half an answer more against the candidate.

    Raises:
        ValueError: Too few groups have no interval.
    """
    at_margin = score_variance(variance / 2, variance / 2, 1, margin)
    score = _critical(scored, level) * math.sqrt(at_margin / scored.rows) + HALF / scored.rows
    return max(half_width(scored, variance, level), score)


def chance_to_pass(scored: Scored, variance: float, margin: float, level: float = LEVEL) -> float:
    """How likely a candidate that is truly equal has its whole interval within the margin (normal approximation).

    Raises:
        ValueError: Too few groups have no interval.
    """
    room, error = margin - reach_at(scored, variance, margin, level), math.sqrt(variance / scored.rows)
    return _NORMAL.cdf(room / error) if error else float(room >= 0)


def later_level(looks: int) -> float:
    """Of the interval that decides for all candidates but the first on the same rows (flows/gate/looks.py).

    Args:
        looks: `gate.looks`, how many candidates they may judge.
    """
    return 1 - (1 - LEVEL) / (looks - 1) if looks > 1 else LEVEL


def margin_that_does(scored: Scored, variance: float) -> float:
    """The margin within which a candidate that is truly equal passes 4 times in 5.

    Raises:
        ValueError: Too few groups have no interval.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if chance_to_pass(scored, variance, middle) >= POWER else (middle, high)
    return high


def enough_rows(margin: float, variance: float, *, each: float = 1.0) -> int | None:
    """Rows with which a candidate that is truly equal passes 4 times in 5; None where ten million would not do.

    Args:
        margin: What it may lose.
        variance: Of one row's difference.
        each: Rows of a group, of equal size.
    """

    def do(rows: int) -> bool:
        scored = Scored(rows, rows, max(rows / each, FEWEST_GROUPS))
        return rows >= FEWEST_GROUPS * each and chance_to_pass(scored, variance, margin) >= POWER

    low, high = 0, 1
    while not do(high):
        low, high = high, 2 * high
        if high > MOST_ROWS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if do(middle) else (middle, high)
    return high


def _critical(scored: Scored, level: float) -> float:
    """Student's t with one degree less than there are groups of equal size.

    By `t_quantile`: with four degrees 0.03 % off at 95 % and 1.3 % at 99.9 %, with eight 0.06 % at most.
    """
    if scored.too_few_groups:
        raise ValueError(str(scored.too_few_groups))
    return t_quantile(_NORMAL.inv_cdf((1 + level) / 2), scored.effective - 1)


def t_quantile(z: float, degrees: float) -> float:
    """Student's t at the probability of a normal quantile (Abramowitz and Stegun 26.7.5)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def score_variance(ahead: float, behind: float, n: float, difference: float) -> float:
    """Of ahead - behind among n questions, where their true difference is this share of n (Tango 1998).

    The other share, of questions behind, is the likeliest one at that difference.
    """
    linear = (2 * n - ahead + behind) * difference - ahead - behind
    constant = -behind * difference * (1 - difference)
    share = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    return n * (2 * share + difference * (1 - difference))
