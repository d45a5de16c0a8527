"""How much of what fine-tuning gained an arm keeps: (arm - base) / (nf4-adapter - base), with an interval.

Recovery is often given as such a share, of a loss that came back or of a gain that was kept, and without an interval.
It is a ratio of two paired differences with one arm in common, so its interval is Fieller's, with the covariance of
the two over the same groups and the critical value of the bootstrap. Where the gain itself is not shown the share can
be anything, and none is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from flows.results.cells import ArmEvidence
from flows.results.comparisons import REFERENCE
from flows.results.paired import Draw, Paired, paired, why_not
from flows.results.read import RunArm
from flows.results.rows import RowScores
from flows.results.stats import (
    LEVEL,
    Estimand,
    Interval,
    Studentized,
    Sums,
    difference_intervals,
    student,
    studentized,
)

BASE = "base"
ROLES = ("merged", "scheme", "on-base", "kv-cache")  # controls are made to be worse, external models gained nothing
Metric = Literal["task", "loss"]
SOURCES: dict[Metric, str] = {"task": "task", "loss": "nll"}
NOT_SHOWN = f"no gain of {REFERENCE} over {BASE} is shown, so there is no share of it"


class Share(NamedTuple):
    """(a - low) / (high - low) with its 95 % interval: 1 is all of it, 0 none."""

    value: float
    ci95: Interval


class Gain(NamedTuple):
    """high - low, whose shares are asked for.

    Attributes:
        boot: Of the difference.
        ci95: Of the difference; a share is asked for only where it leaves out zero.
    """

    high: RowScores
    low: RowScores
    boot: Studentized
    ci95: Interval

    @classmethod
    def of(cls, pair: Paired, draws: Draw) -> Gain:
        """From two arms on the same rows: a is the better one, as the caller means it."""
        (boot,) = studentized([Estimand(pair.a.sums, pair.b.sums, pair.link)], draws(pair.a.groups))
        return cls(pair.a, pair.b, boot, difference_intervals([boot])[0])

    @property
    def shown(self) -> bool:
        """The difference is not zero, at 95 %."""
        return not self.ci95.low <= 0 <= self.ci95.high

    def share(self, a: RowScores, draws: Draw) -> Share | None:
        """What a keeps of it, on the same rows; None where the difference is not shown.

        The critical value is that of a - low - share * (high - low), which Fieller's interval asks about. Where few
        rows are discordant between a and high, it leaves as much room as a difference of shares does (rule of three).
        """
        if not self.shown:
            return None
        bottom = self.boot.at
        value = (a.sums.value - self.low.sums.value) / bottom
        top, whole = (Sums(one.sums.total - self.low.sums.total, a.sums.count) for one in (a, self.high))
        (left,) = studentized([Estimand(Sums(top.total - value * whole.total, a.sums.count))], draws(a.groups))
        critical = max(float(np.quantile(np.abs(left.t), LEVEL, method="higher")), student(left.effective))
        interval = fieller(top, whole, critical)
        room = self.boot.least / abs(bottom)
        return interval and Share(value, Interval(min(interval.low, value - room), max(interval.high, value + room)))


def fieller(top: Sums, bottom: Sums, critical: float) -> Interval | None:
    """Interval of top / bottom, two means on the same groups; None where the bottom may be zero (Fieller 1954).

    All r for which top - r * bottom is within `critical` of its own standard errors from zero: the roots of a quadratic
    in r. Where the bottom is that close to zero itself, they hold no interval but everything, or all but one.
    """
    groups, n = len(top.total), top.count.sum()
    over, under = (one.apart * one.residual / n for one in (top, bottom))
    scale = critical**2 * (groups - 1) / groups
    a = bottom.value**2 - scale * float(under @ under)
    b = top.value * bottom.value - scale * float(over @ under)
    c = top.value**2 - scale * float(over @ over)
    if a <= 0:
        return None
    root = np.sqrt(max(b * b - a * c, 0.0))
    return Interval(float((b - root) / a), float((b + root) / a))


def kept(evidence: Mapping[str, ArmEvidence], draws: Draw) -> dict[str, Any] | None:
    """`kept` of report.json; None where the run has no base or no nf4-adapter, or nothing that could keep anything."""
    arms = [one.arm for one in evidence.values() if one.arm.role in ROLES and one.failure is None]
    if not arms or not {BASE, REFERENCE} <= set(evidence):
        return None
    sections = {metric: _section(metric, arms, evidence, draws) for metric in SOURCES}
    made = {metric: section for metric, section in sections.items() if section is not None}
    return {"from": BASE, "to": REFERENCE, **made} if made else None


def _section(
    metric: Metric, arms: Sequence[RunArm], evidence: Mapping[str, ArmEvidence], draws: Draw
) -> dict[str, Any] | None:
    """The gain and what each arm keeps of it; None of a metric that neither of the two has."""
    low, high = (evidence[slug].scores.get(SOURCES[metric]) for slug in (BASE, REFERENCE))
    if low is None and high is None:
        return None
    pair = paired(high, low, "share" if metric == "task" else "mean")
    if not isinstance(pair, Paired):
        return {"gain": None, "ci95": None, "reason": f"{REFERENCE} and {BASE}: {why_not(pair, high)}", "arms": {}}
    gain = Gain.of(pair, draws)
    told = {"gain": gain.boot.estimate, "ci95": list(gain.ci95)}
    if not gain.shown or (gain.boot.at > 0) != (metric == "task"):
        return {**told, "reason": NOT_SHOWN, "arms": {}}
    shares = {arm.slug: _share(gain, evidence[arm.slug].scores.get(SOURCES[metric]), draws) for arm in arms}
    return {**told, "reason": None, "arms": shares}


def _share(gain: Gain, rows: RowScores | None, draws: Draw) -> dict[str, Any]:
    pair = paired(rows, gain.high)
    if not isinstance(pair, Paired):
        return {"share": None, "ci95": None, "reason": why_not(pair, rows)}
    share = gain.share(pair.a, draws)
    if share is None:
        return {"share": None, "ci95": None, "reason": NOT_SHOWN}
    return {"share": share.value, "ci95": list(share.ci95), "reason": None}
