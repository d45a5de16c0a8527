"""Two arms on the same rows: whether they can be compared, and their difference with its intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from flows.results.rows import RowScores
from flows.results.stats import (
    FEWEST_GROUPS,
    LEVEL,
    Counts,
    Estimand,
    Interval,
    Link,
    Studentized,
    difference_intervals,
    studentized,
)

Draw = Callable[[tuple[str, ...]], Counts]  # the resamples of some groups; equal groups get equal draws
Obstacle = Literal["missing", "other device", "other rows", "not finite", "one group", "few groups"]
OTHER_DEVICE = "scored on another device"


class Paired(NamedTuple):
    """Scores of one metric of two arms on the same rows, in one order."""

    a: RowScores
    b: RowScores
    link: Link = "mean"


class Difference(NamedTuple):
    """a - b in the metric's own unit, with its own interval and the one that holds over the whole family.

    Attributes:
        ci_level: Its own interval at the level that was asked for; at 95 % it is ci95.
        ci_level_adjusted: As that, over the whole family.
    """

    boot: Studentized
    ci95: Interval
    ci95_adjusted: Interval
    ci_level: Interval
    ci_level_adjusted: Interval

    @property
    def estimate(self) -> float:
        """Of a - b."""
        return self.boot.estimate


def paired(a: RowScores | None, b: RowScores | None, link: Link = "mean") -> Paired | Obstacle:
    """The pair, or why it cannot be compared; each caller has its own words for that."""
    if a is None or b is None:
        return "missing"
    if not a.same_device(b):
        return "other device"
    if not a.same_rows(b):
        return "other rows"
    if not (a.finite and b.finite):
        return "not finite"
    if len(a.groups) < 2:
        return "one group"
    return "few groups" if a.sums.effective < FEWEST_GROUPS else Paired(a, b, link)


TOO_FEW_GROUPS = "too few groups"
ONE_GROUP = f"{TOO_FEW_GROUPS}: one, so nothing can be said about the spread"


def too_few_groups(groups: int, effective: float) -> str:
    """Why so few groups have no interval: `too few groups: 20, which count as 3.8 of equal size; 5 are needed`.

    Args:
        groups: How many there are.
        effective: How many of equal size they count as.
    """
    if groups < 2:
        return ONE_GROUP if groups else f"{TOO_FEW_GROUPS}: none"
    lopsided = f", which count as {effective:.1f} of equal size" if effective < groups - 0.05 else ""
    return f"{TOO_FEW_GROUPS}: {groups}{lopsided}; {FEWEST_GROUPS} are needed"


def few_groups(rows: RowScores | None) -> str | None:
    """Why these rows have no interval; None where they may have one."""
    if rows is None or (len(rows.groups) >= 2 and rows.sums.effective >= FEWEST_GROUPS):
        return None
    return too_few_groups(len(rows.groups), rows.sums.effective)


def differences(family: Sequence[Paired], draws: Draw, *, level: float = LEVEL) -> list[Difference]:
    """Bootstrap a family, in its order; pairs on the same groups share one matrix product.

    Args:
        family: Every pair.
        draws: The resamples of some groups.
        level: Of the intervals that decide; those at 95 % are always there.
    """
    by_groups: dict[tuple[str, ...], list[int]] = {}
    for place, pair in enumerate(family):
        by_groups.setdefault(pair.a.groups, []).append(place)
    boots: dict[int, Studentized] = {}
    for groups, places in by_groups.items():
        members = (family[place] for place in places)
        estimands = [Estimand(pair.a.sums, pair.b.sums, pair.link) for pair in members]
        boots |= zip(places, studentized(estimands, draws(groups)), strict=True)
    ordered = [boots[place] for place in range(len(family))]
    plain = [difference_intervals([boot])[0] for boot in ordered]
    together = difference_intervals(ordered)
    if level == LEVEL:
        return list(map(Difference, ordered, plain, together, plain, together))
    able = [boot.at_level(level) for boot in ordered]
    own = [difference_intervals([boot], level=level)[0] for boot in able]
    return list(map(Difference, ordered, plain, together, own, difference_intervals(able, level=level)))
