"""Two arms on the same rows: whether they can be compared, and their difference with its intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from flows.results.rows import RowScores
from flows.results.stats import Counts, Estimand, Interval, Link, Studentized, difference_intervals, studentized

Draw = Callable[[tuple[str, ...]], Counts]  # the resamples of some groups; equal groups get equal draws
Obstacle = Literal["missing", "other device", "other rows", "not finite", "one group"]
OTHER_DEVICE = "scored on another device"
ONE_GROUP = "one group of rows only: nothing can be said about the spread"


class Paired(NamedTuple):
    """Scores of one metric of two arms on the same rows, in one order."""

    a: RowScores
    b: RowScores
    link: Link = "mean"


class Difference(NamedTuple):
    """a - b in the metric's own unit, with its own interval and the one that holds over the whole family."""

    boot: Studentized
    ci95: Interval
    ci95_adjusted: Interval

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
    return "one group" if len(a.groups) < 2 else Paired(a, b, link)


def differences(family: Sequence[Paired], draws: Draw) -> list[Difference]:
    """Bootstrap a family, in its order; pairs on the same groups share one matrix product."""
    by_groups: dict[tuple[str, ...], list[int]] = {}
    for place, pair in enumerate(family):
        by_groups.setdefault(pair.a.groups, []).append(place)
    boots: dict[int, Studentized] = {}
    for groups, places in by_groups.items():
        members = (family[place] for place in places)
        estimands = [Estimand(pair.a.sums, pair.b.sums, pair.link) for pair in members]
        boots |= zip(places, studentized(estimands, draws(groups)), strict=True)
    ordered = [boots[place] for place in range(len(family))]
    together = difference_intervals(ordered)
    return [
        Difference(boot, difference_intervals([boot])[0], adjusted)
        for boot, adjusted in zip(ordered, together, strict=True)
    ]
