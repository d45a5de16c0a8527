"""Two arms on the same rows: whether they can be compared, and their difference with its intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from flows.results.draws import Drawn
from flows.results.rows import RowScores
from flows.results.stats import LEVEL, Estimand, Interval, Link, Studentized, difference_intervals, studentized
from recipes.checks.power import FEWEST_GROUPS, too_few_groups

Draw = Callable[[tuple[str, ...]], Drawn]  # the resamples of some groups; equal groups get equal draws
Obstacle = Literal["missing", "other device", "other rows", "not finite", "one group", "few groups"]
OTHER_DEVICE = "scored on another device"
WORDS: Mapping[Obstacle, str] = {
    "missing": "no such scores",
    "other device": OTHER_DEVICE,
    "other rows": "not scored on the same rows and tokens",
    "not finite": "scores that are not finite",
}


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
    """The pair, or why it cannot be compared: see `why_not`."""
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


def few_groups(rows: RowScores | None) -> str | None:
    """Why these rows have no interval; None where they may have one."""
    if rows is None or (len(rows.groups) >= 2 and rows.sums.effective >= FEWEST_GROUPS):
        return None
    return too_few_groups(len(rows.groups), rows.sums.effective)


def why_not(obstacle: Obstacle, rows: RowScores | None, words: Mapping[Obstacle, str] = WORDS) -> str:
    """An obstacle in words.

    Args:
        obstacle: What kept two arms from being paired.
        rows: Of the first one.
        words: The caller's own, where it has better ones than WORDS.
    """
    return words.get(obstacle) or WORDS.get(obstacle) or str(few_groups(rows))


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
