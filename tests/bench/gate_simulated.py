"""Years of weekly retrains through the gate's rule, simulated; gate_years.py writes what came of them.

Every week a candidate is judged on the same rows of test. Models are columns of right and wrong answers: each takes the
same truth about the rows and turns some of the answers by chance, so that two of them differ on a stated share of the
rows, the flip rate. What decides is the gate's own: the level of each look (flows/gate/looks.py), which version is the
best (flows/promotion/chain.py), margins and outcomes as in flows/gate/checks.py. Only the interval is computed from the
two counts of discordant rows instead of from tables; tests/bench/test_gate_years.py holds it to the gate's decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows.gate.checks import Outcome
from flows.gate.looks import Looks
from flows.promotion.chain import ahead
from flows.results.draws import RESAMPLES, SEED, draw
from flows.results.score_interval import score_interval
from flows.results.stats import LEVEL, Sums, student
from recipes.checks.power import HALF
from recipes.schema import Gate

MARGIN, LIMIT = Gate().task, Gate().looks
WEEKS, YEARS = 52, 1000
SHARE = 0.8  # of the answers that a model gets right
FEWER = 5  # of the years, for what comes out near 0 or 100 %, or as a mean
DEV = 2 / 3  # rows of dev for each of test, as data.dev and data.test are by default
Bools = NDArray[np.bool_]
Rule = Literal["champion at 95 %", "champion", "best on test", "best on dev"]


# ---- the gate's interval from counts


@cache
def drawn(rows: int) -> NDArray[np.uint16]:
    """[rows + 1, resamples] how many of the first 0, 1, 2 ... rows were drawn: the gate's own resamples."""
    counts = np.zeros((rows + 1, RESAMPLES), dtype=np.uint16)
    np.cumsum(draw(rows).T, axis=0, dtype=np.uint16, out=counts[1:])
    return counts


@cache
def outcome(worse: int, better: int, rows: int, level: float, margin: float = MARGIN, *, score: bool = True) -> Outcome:
    """The gate's word on a task where so many of the rows are worse and better, each row a group.

    The symmetric studentized bootstrap of flows/results/stats.py in closed form: among rows that score -1, 1 and 0 only
    the numbers of each that were drawn count. Its critical value has Student's t as a floor, so an
    interval that is too wide with the floor alone needs no bootstrap. To pass, Tango's score interval has to be within
    the margin, too; without `score` it is left out.
    """
    lost = (worse - better) / rows
    se = float(np.sqrt((worse + better - rows * lost**2) / (rows - 1) / rows))
    least = 1 - ((1 - level) / 2) ** (1 / rows)
    z = student(rows, level)
    half = max(least, z * se)
    if lost + half < margin or lost - half > margin:
        half = max(half, critical(worse, better, rows, level) * se)
    apart = float(np.sqrt(worse + better - rows * lost**2)) / rows
    wider = max(1.0, se / apart) if apart else 1.0
    most = score_interval(worse, better, rows, z=z, inflated=wider, correction=HALF).high
    if max(lost + half, most if score else lost) < margin:
        return "pass"
    return "worse" if lost - half > margin else "undecided"


def critical(worse: int, better: int, rows: int, level: float) -> float:
    """The level's quantile of |t*|."""
    if worse + better == 0:
        return 0.0
    first, turned = (drawn(rows)[number].astype(np.float64) for number in (worse, worse + better))
    lost = 2 * first - turned
    mean, drawn_mean = (worse - better) / rows, lost / rows
    spread = float(np.sqrt((worse + better - rows * mean**2) / (rows - 1) / rows))
    squares = np.maximum(turned - rows * drawn_mean**2, 0.0)
    resampled = np.sqrt(squares / (rows - 1) / rows)
    residuals = np.asarray([1 - mean, -1 - mean, -mean])
    weights = np.asarray([worse, better, rows - worse - better])
    active = float((weights @ residuals**2) ** 2 / (weights @ residuals**4))
    smallest = spread / np.sqrt(2 * rows)
    se = np.where(resampled <= 1e-6 * spread, spread / np.sqrt(2 * active), np.maximum(resampled, smallest))
    size = np.sort(np.abs(drawn_mean - mean) / se)
    return float(size[int(np.ceil(level * len(size) - 1e-9)) - 1])


# ---- models and years


class Model(NamedTuple):
    """A version: its true share of right answers, and its answers to the rows of test and dev."""

    share: float
    test: Bools
    dev: Bools


@dataclass(frozen=True)
class Rows:
    """The rows of a year: whether a model answers them right before chance turns some of its answers."""

    test: Bools
    dev: Bools

    @classmethod
    def new(cls, rng: np.random.Generator, rows: int) -> Rows:
        """So many rows of test, and dev beside them."""
        return cls(rng.random(rows) < SHARE, rng.random(int(DEV * rows)) < SHARE)

    def model(self, rng: np.random.Generator, share: float, flips: float) -> Model:
        """A model with that true share; two such with equal shares differ on `flips` of the rows."""
        turned = max(flips / 2, abs(share - SHARE))
        lost, won = ((turned - share + SHARE) / 2 / SHARE, (turned + share - SHARE) / 2 / (1 - SHARE))

        def answers(right: Bools) -> Bools:
            chance = rng.random(len(right))
            return np.where(right, chance >= lost, chance < won)

        return Model(share, answers(self.test), answers(self.dev))


def compared(a: Model, b: Model, level: float, margin: float = MARGIN, *, score: bool = True) -> Outcome:
    """Candidate a against b."""
    worse, better = int((b.test & ~a.test).sum()), int((a.test & ~b.test).sum())
    return outcome(worse, better, len(a.test), level, margin, score=score)


def level_of(look: int, rule: Rule) -> float:
    """Level of a look."""
    return LEVEL if rule == "champion at 95 %" else Looks(number=look, limit=LIMIT).level


def better(later: Model, best: Model, rule: Rule) -> bool:
    """Whether a version takes the place of the best."""
    side = 0 if rule == "best on test" else 1
    a, b = ((one.test, one.dev)[side] for one in (later, best))
    if rule == "best on test":
        return bool(a.sum() > b.sum())
    ones = np.ones(len(a))
    return ahead(Sums(a.astype(np.float64), ones), Sums(b.astype(np.float64), ones), higher=True)


@dataclass
class Year:
    """What became of a year's candidates."""

    outcomes: list[Outcome] = field(default_factory=list)
    shipped: list[float] = field(default_factory=list)  # true share of the champion after each week

    @property
    def blocked_at(self) -> int:
        """First week that was not promoted, from 1; 99 where there is none."""
        return next((week for week, word in enumerate(self.outcomes, 1) if word != "pass"), 99)


def year(rng: np.random.Generator, rows: Rows, shares: Sequence[float], flips: float, rule: Rule) -> Year:
    """A champion of the share SHARE, and a candidate of a given share each week."""
    first = champion = best = rows.model(rng, SHARE, flips)
    told = Year()
    for look, share in enumerate(shares, 1):
        candidate, level = rows.model(rng, share, flips), level_of(look, rule)
        others = [champion] if rule.startswith("champion") or best is champion else [champion, best]
        words = {compared(candidate, other, level) for other in others}
        word: Outcome = "worse" if "worse" in words else "pass" if words == {"pass"} else "undecided"
        if word == "pass":
            champion = candidate
            best = candidate if better(candidate, best, rule) else best
        told.outcomes.append(word)
        told.shipped.append(champion.share)
    assert first.share == SHARE
    return told


def independent(
    rng: np.random.Generator, rows: Rows, flips: float, *, share: float, margin: float, spend: bool, score: bool = True
) -> list[Outcome]:
    """Each week's candidate against a model of its own, as a quantized one against the merged one: one check alone."""
    words: list[Outcome] = []
    for look in range(1, WEEKS + 1):
        level = level_of(look, "champion" if spend else "champion at 95 %")
        other = rows.model(rng, SHARE, flips)
        words.append(compared(rows.model(rng, share, flips), other, level, margin, score=score))
    return words


# ---- the four questions


def every_year(years: int, rows: int, told: Callable[[np.random.Generator, Rows], Year]) -> list[Year]:
    """As many years, each with rows and luck of its own."""
    rngs = (np.random.default_rng([SEED, rows, number]) for number in range(years))
    return [told(rng, Rows.new(rng, rows)) for rng in rngs]


def at_the_edge(years: int, rows: int, flips: float, *, spend: bool, score: bool = True) -> float:
    """Share of years in which one of 52 candidates that are truly at the margin's edge is promoted."""
    rngs = (np.random.default_rng([SEED, rows, number]) for number in range(years))
    passed = [
        "pass"
        in independent(rng, Rows.new(rng, rows), flips, share=SHARE - MARGIN, margin=MARGIN, spend=spend, score=score)
        for rng in rngs
    ]
    return float(np.mean(passed))


def called_worse(years: int, rows: int, flips: float, *, spend: bool) -> float:
    """Share of years in which one of 52 candidates is called worse than its equal, where nothing may be lost."""
    rngs = (np.random.default_rng([SEED, rows, number]) for number in range(years))
    told = [
        "worse" in independent(rng, Rows.new(rng, rows), flips, share=SHARE, margin=0.0, spend=spend) for rng in rngs
    ]
    return float(np.mean(told))


class Decline(NamedTuple):
    """Years in which each candidate is a step worse than the one before.

    Attributes:
        within: Share of years that block one within three weeks.
        lost: True loss of what ships after the year: mean and most, in points.
    """

    within: float
    lost: float
    most: float


def decline(years: int, rows: int, flips: float, rule: Rule, *, step: float = 0.01) -> Decline:
    """A true loss of `step` a week."""
    shares = [SHARE - step * week for week in range(1, WEEKS + 1)]
    told = every_year(years, rows, lambda rng, own: year(rng, own, shares, flips, rule))
    lost = [100 * (SHARE - one.shipped[-1]) for one in told]
    return Decline(float(np.mean([one.blocked_at <= 3 for one in told])), float(np.mean(lost)), max(lost))


class Equal(NamedTuple):
    """Years of candidates that are all truly equal.

    Attributes:
        worse: Share of years in which one is called worse.
        first: Share of the first candidates that are promoted.
        later: Of the others.
        a_year: Promotions a year.
    """

    worse: float
    first: float
    later: float
    a_year: float


def equal(years: int, rows: int, flips: float, rule: Rule) -> Equal:
    """Every candidate is truly as good as the champion."""
    told = every_year(years, rows, lambda rng, own: year(rng, own, [SHARE] * WEEKS, flips, rule))
    passed = np.asarray([[word == "pass" for word in one.outcomes] for one in told])
    worse = float(np.mean(["worse" in one.outcomes for one in told]))
    return Equal(worse, float(passed[:, 0].mean()), float(passed[:, 1:].mean()), float(passed.sum(axis=1).mean()))


class Improved(NamedTuple):
    """Share of better candidates that are promoted, as the first look and as a later one."""

    first: float
    later: float


def improved(years: int, rows: int, flips: float, *, gain: float = 0.03) -> Improved:
    """A candidate that is truly better than the champion by `gain`."""
    words = {1: [], 2: []}
    for number in range(years):
        rng = np.random.default_rng([SEED, rows, number])
        own = Rows.new(rng, rows)
        champion, candidate = own.model(rng, SHARE, flips), own.model(rng, SHARE + gain, flips)
        for look, found in words.items():
            found.append(compared(candidate, champion, level_of(look, "best on dev")) == "pass")
    return Improved(float(np.mean(words[1])), float(np.mean(words[2])))
