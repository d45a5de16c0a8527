"""Intervals and comparisons of arms: a paired bootstrap over groups, written as a few matrix products.

Rows of one group stand or fall together, so groups are resampled, not rows or tokens. An estimate is a ratio of sums
(sum of scores / number of tokens or rows); a resample weighs every group by how often it was drawn, and its estimate
is again sum / sum. All arms see the same draws, so every comparison is paired.

Which interval, and why (tests/flows/results/test_stats.py measures the coverage; docs/report.md has the figures):

* differences: symmetric studentized bootstrap, estimate +- c * se with c from |t*| = |estimate* - estimate| / se*.
  The percentile bootstrap shows 7-8 % false differences at 100 rows of heavy-tailed losses and calls 4 discordant
  rows of 4 a difference (sign test: p = 0.13); BCa and equal-tailed studentized intervals miss 20 % of the time
  where only a few rows are discordant.
* one arm's mean loss or KL: equal-tailed studentized bootstrap (losses are skewed; a symmetric interval reaches below
  zero). Perplexity is the exponential of the loss's interval.
* one arm's proportion (task, top-1 agreement): Wilson's interval with the effective sample size that the spread
  between groups leaves. At 0 right of 300 every bootstrap says [0, 0].
* differences of perplexities, which may be 0.001 or 1,000: the interval of the difference in mean loss, carried over
  by exp with the smaller perplexity held fixed. Differences of shares are never claimed more exactly than the rule of
  three allows: no discordant group among G leaves room for 3.7 / G.
* simultaneous over a family: max-|t| of the bootstrap, each |t| on the scale of its own bootstrap distribution
  (Beran 1988, JASA 83:679; Westfall and Young's min-p), so that one comparison with two
  discordant rows does not widen all the others. Never wider than Bonferroni; a family of one gives ci95 itself.
* few or lopsided groups: of 3 groups the bootstrap sees too few resamples, and of 20 where one holds half of the
  tokens it sees one. Both count as (sum n)^2 / sum n^2 groups of equal size. No critical value is less than Student's
  t with one degree of freedom less than that, standard errors are those of the jackknife over groups (MacKinnon,
  Nielsen and Webb 2023, J. Appl. Econometrics 38:671: the others are too small where groups are lopsided), and below
  five such groups there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from flows.results.draws import CHUNK_BYTES, Counts, Drawn, Floats, counts_of, groups_of, weighted_sums
from recipes.checks.power import LEVEL, t_quantile

Z = 1.959964  # 97.5 % quantile of the normal distribution; scipy's is 1.5e-8 less, and figures rest on this one
Z_POWER = 0.841621  # 80 %: Z + Z_POWER standard errors are called different 4 times in 5

Link = Literal["mean", "share", "exp"]


class Interval(NamedTuple):
    """Two ends of an interval, at 95 % where nothing else is said."""

    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Sums:
    """One metric of one arm, summed within groups.

    Attributes:
        total: [groups] sum of scores.
        count: [groups] tokens or rows behind each sum.
    """

    total: Floats
    count: Floats

    @property
    def value(self) -> float:
        """Sum of scores over number of tokens or rows."""
        return float(self.total.sum() / self.count.sum())

    @cached_property
    def residual(self) -> Floats:
        """[groups] total - value * count: what the group adds beyond its share. Sums to zero."""
        return self.total - self.value * self.count

    @cached_property
    def effective(self) -> float:
        """Groups of equal size that these count as."""
        return effective_groups(self.count)

    @cached_property
    def apart(self) -> Floats:
        """[groups] 1 / (1 - the group's share of the count): what the jackknife makes of its residual."""
        return 1 / np.maximum(1 - self.count / self.count.sum(), 1e-9)


def effective_groups(count: Floats) -> float:
    """(sum n)^2 / sum n^2: the number of groups where they are equal, near 1 where one holds nearly everything.

    Args:
        count: [groups] tokens or rows.
    """
    squares = float((count**2).sum())
    return float(count.sum() ** 2) / squares if squares else 0.0


def student(effective: float, level: float = LEVEL) -> float:
    """Standard errors to both sides that hold at a level, of so many groups of equal size: Student's t."""
    return float(stdtrit(max(effective - 1, 1.0), (1 + level) / 2))


@dataclass(frozen=True, eq=False)
class Estimand:
    """What is estimated: mean of a - mean of b, exp(mean of a) - exp(mean of b), or the mean of a where b is None.

    a and b hold the same groups in the same order with the same counts. A share is a mean of scores from 0 to 1.
    """

    a: Sums
    b: Sums | None = None
    link: Link = "mean"

    @property
    def residual(self) -> Floats:
        """[groups] what a group adds to a - b beyond its share."""
        return self.a.residual - self.b.residual if self.b else self.a.residual

    @property
    def value(self) -> float:
        """Mean of a - mean of b, or the mean of a."""
        return self.a.value - (self.b.value if self.b else 0.0)


@dataclass(frozen=True, eq=False)
class Studentized:
    """An estimate with its cluster-robust standard error and the bootstrap distribution of its t.

    Attributes:
        at: Difference of means, or the mean.
        se: Its standard error.
        t: [resamples] (at* - at) / se*; all zero where se is zero.
        effective: Groups of equal size behind it: Student's t with one degree less is the least critical value.
        least: Half-width that an interval has at least.
        unit: The smaller perplexity, where perplexities are compared.
    """

    at: float
    se: float
    t: Floats
    effective: float
    least: float = 0.0
    unit: float | None = None

    @property
    def estimate(self) -> float:
        """The mean, or the difference in the metric's own unit."""
        return self._own(self.at)

    def symmetric(self, critical: float) -> Interval:
        """Interval at +- critical * se, in the metric's own unit."""
        half = max(critical * self.se, self.least)
        return Interval(self._own(self.at - half), self._own(self.at + half))

    def at_level(self, level: float) -> Studentized:
        """The same with the least half-width of another level: what no discordant group of all leaves open there."""
        kept = (1 - self.least) ** (np.log((1 - level) / 2) / np.log((1 - LEVEL) / 2))
        return replace(self, least=1 - float(kept))

    def _own(self, at: float) -> float:
        """exp(a) - exp(b) from a - b: unit * (exp(|a - b|) - 1) with the sign of a - b."""
        return at if self.unit is None else float(np.copysign(self.unit * np.expm1(abs(at)), at))


def _columns(estimand: Estimand) -> Floats:
    """[groups, 5] residuals and counts, and the squares and products of what the jackknife makes of them."""
    residual, count, apart = estimand.residual, estimand.a.count, estimand.a.apart
    return np.stack(
        [residual, count, (apart * residual) ** 2, apart**2 * residual * count, (apart * count) ** 2], axis=1
    )


def studentized(estimands: Sequence[Estimand], draws: Drawn) -> list[Studentized]:
    """Bootstrap all estimands with the same draws.

    The standard error is that of the jackknife over groups, computed anew in every resample. A resample in which all
    drawn groups agree (no discordant row) has se* = 0: it takes the se of half a discordant group. se* never counts as
    less than se / sqrt(2 G), which bounds t.

    Raises:
        ValueError: Fewer than two groups: nothing can be said about the spread.
    """
    if groups_of(draws) < 2:
        raise ValueError("an interval needs at least two groups")
    if not estimands:
        return []
    sums = weighted_sums(draws, np.concatenate([_columns(estimand) for estimand in estimands], axis=1))
    blocks = np.split(sums, len(estimands), axis=1)
    return [_studentize(estimand, block, groups_of(draws)) for estimand, block in zip(estimands, blocks, strict=True)]


def standard_error(estimand: Estimand) -> float:
    """Of the jackknife over groups: sqrt((G - 1) / G * sum of (residual / (1 - share))^2) / n for G >= 2 groups.

    With groups of equal size that is the linearised one, sqrt(G / (G - 1) * sum of residuals^2) / n. A group with half
    of all tokens draws the mean to itself, so that its own residual is half of what it should be.
    """
    groups, jackknifed = len(estimand.a.total), estimand.a.apart * estimand.residual
    return float(np.sqrt((groups - 1) / groups * (jackknifed**2).sum()) / estimand.a.count.sum())


def _studentize(estimand: Estimand, sums: Floats, groups: int) -> Studentized:
    a, b, residual = estimand.a, estimand.b, estimand.residual
    drawn, n, squares, products, counts = sums.T
    at = estimand.value
    moved = drawn / n
    variance = squares - 2 * moved * products + moved**2 * counts
    correction = (groups - 1) / groups
    spread = standard_error(estimand)
    least, unit = 0.0, None
    if b is not None and estimand.link == "share":
        least = 1 - float(((1 - LEVEL) / 2) ** (1 / a.effective))
    if b is not None and estimand.link == "exp":
        unit = float(np.exp(min(a.value, b.value)))
    if spread <= 1e-12 * max(1.0, abs(at)):  # equal in every group, up to rounding
        return Studentized(at, 0.0, np.zeros(len(sums)), a.effective, least, unit)
    resampled = np.sqrt(correction * np.maximum(variance, 0.0)) / n
    active = float((residual**2).sum() ** 2 / (residual**4).sum())  # groups that carry the spread
    constant = resampled <= 1e-6 * spread
    se = np.where(constant, spread / np.sqrt(2 * active), np.maximum(resampled, spread / np.sqrt(2 * groups)))
    # Rounding makes ties exact: of few discordant rows many resamples have the same t but for bits that depend on the
    # processor's matrix product. Ranked apart, such ties widened a family beyond Bonferroni's 2.24 to 2.33.
    return Studentized(at, spread, np.round(moved / se, 9), a.effective, least, unit)


def mean_interval(mean: Studentized) -> Interval:
    """Equal-tailed studentized interval of one arm's mean; no side is nearer than Student's t."""
    floor = student(mean.effective)
    below, above = np.quantile(mean.t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean.at - max(float(above), floor) * mean.se, mean.at - min(float(below), -floor) * mean.se)


def difference_intervals(family: Sequence[Studentized], *, level: float = LEVEL) -> list[Interval]:
    """Symmetric studentized intervals that hold together at `level`: with one member the plain interval.

    In every resample each |t*| is replaced by the share of its own bootstrap values below it; the largest share over
    the family is the statistic, and its point at the level, put back on each comparison's own scale, is the critical
    value. It is never less than Student's t at that share (at Bonferroni's, where that is less): few or lopsided groups
    have too few different resamples, and above 95 % few of all lie beyond the point (10 of 10,000 at 99.9 %).
    """
    moving = [member for member in family if member.se > 0]
    share = 1.0
    if moving:
        worst = np.zeros(len(moving[0].t))
        for member in moving:
            size = np.abs(member.t)
            worst = np.maximum(worst, np.searchsorted(np.sort(size), size, side="left") / len(size))
        share = _critical_share(worst, level)
    most = 1 - (1 - level) / max(1, len(moving))
    intervals: list[Interval] = []
    for member in family:
        size = np.sort(np.abs(member.t))
        critical = float(size[max(0, int(np.ceil(share * len(size))) - 1)])
        floor = student(member.effective, min(max(share, level), most))
        intervals.append(member.symmetric(max(critical, floor)))
    return intervals


def critical_of(level: float) -> float:
    """Standard errors to both sides of an estimate that hold at a level, by the normal distribution; 1.96 at 95 %."""
    return Z if level == LEVEL else NormalDist().inv_cdf((1 + level) / 2)


def _critical_share(worst: Floats, level: float) -> float:
    """Smallest share that at most 1 - level of the resamples reach."""
    ordered = np.sort(worst)
    reached = 1.0 - np.searchsorted(ordered, ordered, side="left") / len(ordered)
    fits = ordered[reached <= 1 - level + 1e-12]
    return float(fits[0]) if len(fits) else 1.0


def proportion_interval(sums: Sums) -> Interval:
    """Wilson's interval with n_eff from the spread between groups (Korn and Graubard 1998, Survey Methodology 24:193).

    n_eff = p (1 - p) / se**2, times (t of the rows / t of the groups)**2 for what few groups leave open of the spread;
    with a row a group that is 1. Where all groups agree, n_eff is their number. It is never more than that of the rows.
    """
    rows, p = float(sums.count.sum()), sums.value
    variance = standard_error(Estimand(sums)) ** 2 if len(sums.total) > 1 else 0.0
    size = min(rows, p * (1 - p) / variance) if variance > 1e-18 and 0 < p < 1 else sums.effective
    size *= min(1.0, (student(rows) / student(sums.effective)) ** 2)
    return wilson(p, size)


def wilson(share: float, size: float, z: float = Z) -> Interval:
    """Wilson's interval of a share of so many independent rows; it holds the share itself."""
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z * float(np.sqrt(max(share * (1 - share), 0.0) / size + z**2 / (4 * size**2))) / (1 + z**2 / size)
    return Interval(float(min(max(centre - half, 0.0), share)), float(max(min(centre + half, 1.0), share)))


def upper_quantile(values: Floats, weights: Floats | None = None, *, level: float = 0.99) -> float:
    """Smallest value with at least `level` of the (weighted) values at or below it."""
    order = np.argsort(values)
    mass = np.ones(len(values)) if weights is None else weights[order]
    reached = np.cumsum(mass) / mass.sum()
    return float(values[order][np.searchsorted(reached, level - 1e-12)])


def quantile_interval(values: Floats, group: NDArray[np.int64], draws: Drawn, *, level: float = 0.99) -> Interval:
    """Percentile bootstrap over groups of a token quantile, by weighted counts from the top of the sorted tokens.

    Args:
        values: [tokens].
        group: [tokens] index of each token's group.
        draws: [resamples, groups]; a thousand are enough for a quantile's interval.
        level: Which quantile.
    """
    order = np.argsort(-values, kind="stable")
    ordered, owner = values[order], group[order]
    size = np.bincount(group, minlength=groups_of(draws)).astype(np.float64)
    quantiles = np.concatenate([_quantiles(ordered, owner, size, counts, level) for counts in counts_of(draws)])
    low, high = np.quantile(quantiles, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _quantiles(ordered: Floats, owner: NDArray[np.int64], size: Floats, draws: Counts, level: float) -> Floats:
    """[resamples of a block] the quantile in each; `ordered` descends, `size` is tokens a group."""
    above = (1 - level) * (draws.astype(np.float64) @ size)  # token mass that stays above the quantile
    quantiles = np.full(len(draws), np.nan)
    block = min(max(256, len(ordered) // 50), CHUNK_BYTES // (8 * len(draws)))  # the top 2 % nearly always suffice
    mass = np.zeros(len(draws))
    for start in range(0, len(ordered), block):
        open_ = np.flatnonzero(np.isnan(quantiles))
        if not len(open_):
            break
        running = mass[open_, None] + np.cumsum(
            draws[np.ix_(open_, owner[start : start + block])], axis=1, dtype=np.float64
        )
        passed = running > above[open_, None] + 1e-9
        hit = passed.any(axis=1)
        quantiles[open_[hit]] = ordered[start + passed[hit].argmax(axis=1)]
        mass[open_] = running[:, -1]
    return quantiles


class Repeats(NamedTuple):
    """Geometric mean of repeated timings with its interval."""

    value: float
    interval: Interval


def repeats(values: Sequence[float]) -> Repeats:
    """Geometric mean and the t interval of the logarithms: seconds and tokens/s then say the same.

    Raises:
        ValueError: Fewer than two values or a value that is not positive.
    """
    if len(values) < 2 or min(values) <= 0:
        raise ValueError(f"{len(values)} repeats, smallest {min(values, default=0)}: needs two or more above zero")
    logs = np.log(np.asarray(values, dtype=np.float64))
    half = t_critical(len(values) - 1) * float(logs.std(ddof=1)) / np.sqrt(len(values))
    mean = float(logs.mean())
    return Repeats(float(np.exp(mean)), Interval(float(np.exp(mean - half)), float(np.exp(mean + half))))


def t_critical(df: int) -> float:
    """97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; within 0.001 from 4 degrees of freedom on).

    scipy.stats has the exact one. With it published intervals would change: 2.7756 would be 2.7764 at five repeats.
    """
    return t_quantile(Z, df)
