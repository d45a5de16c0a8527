"""The gate: is the candidate, on test, no worse than what it was made from and what it would replace?

Each check is a difference (candidate - other) with a paired bootstrap interval and a margin from the recipe's `gate:`.

* pass: the whole 95 % interval lies within the margin. A candidate passes where every check does, so each
  is made at its own 95 %: a model that is too bad in one respect has to get through that check, and does so in 2.5 %
  at most, however many others there are (intersection-union, Berger 1982, Technometrics 24:295).
* worse: the interval that holds together over all checks lies wholly beyond the margin.
* undecided: anything else, also a check that cannot be made. It blocks like worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from flows.results.read import RowScores
from flows.results.stats import (
    Z_POWER,
    Counts,
    Estimand,
    Interval,
    Link,
    Studentized,
    Z,
    difference_intervals,
    studentized,
)
from recipes.schema import Gate

Outcome = Literal["pass", "worse", "undecided", "none"]
Unit = Literal["share", "nats", "bits"]  # a share of the answers, nats a token, bits a byte
Draw = Callable[[tuple[str, ...]], Counts]
Scores = Mapping[str, RowScores]  # metric of scores.parquet -> rows
DOMAIN_ROWS = 200  # a slice with fewer is shown and gates nothing
MOST_ROWS = 10_000_000  # a larger n_needed only says: never
BASE = "base"
LABELS = {"general_loss": "general loss", "bits_per_byte": "bits a byte"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One check before its interval is known.

    Attributes:
        metric: `task`, `task.NAME`, `loss`, `general_loss` or `bits_per_byte`.
        source: Metric of scores.parquet.
        against: Arm, or `champion`.
        margin: What may be lost, in shares (task), nats or bits; 0 where the candidate has to be better.
        a: The candidate's rows; None where it has none.
        b: The other's.
        gates: It decides; otherwise it is shown.
    """

    metric: str
    source: str
    against: str
    margin: float
    a: RowScores | None
    b: RowScores | None
    domain: str | None = None
    gates: bool = True

    @property
    def link(self) -> Link:
        """Tasks are shares of right answers, losses are means."""
        return "share" if self.is_task else "mean"

    @property
    def is_task(self) -> bool:
        """A score: higher is better."""
        return self.source.startswith("task")

    @property
    def unit(self) -> Unit:
        """Of difference and margin."""
        return "share" if self.is_task else "bits" if self.source == "bits" else "nats"

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be made."""
        if self.a is None or self.b is None:
            missing = "candidate" if self.a is None else self.against
            return f"{missing} has no such scores"
        if not self.a.same_rows(self.b):
            return "the two were not scored on the same rows and tokens"
        if not (self.a.finite and self.b.finite):
            return "scores that are not finite"
        return "fewer than two groups of rows" if len(self.a.groups) < 2 else None

    @property
    def estimand(self) -> Estimand:
        """Candidate - other. Only where there is no obstacle."""
        assert self.a is not None and self.b is not None
        return Estimand(self.a.sums, self.b.sums, self.link)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check with its outcome.

    Attributes:
        difference: Candidate - other; None where it could not be made, and `reason` says why.
        n: Rows behind it.
        n_needed: Rows that would decide it 4 times in 5, if the difference stays as it is; None where it is decided,
            or no number of rows up to ten million would.
    """

    metric: str
    against: str
    margin: float
    unit: Unit
    outcome: Outcome
    difference: float | None = None
    ci95: Interval | None = None
    ci95_adjusted: Interval | None = None
    n: int = 0
    n_needed: int | None = None
    domain: str | None = None
    gates: bool = True
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        intervals = {name: getattr(self, name) and list(getattr(self, name)) for name in ("ci95", "ci95_adjusted")}
        return {**vars(self), **intervals, "text": told(self)}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Check:
        """From a check of report.json."""
        return cls(**{name: value for name, value in said.items() if name != "text"})


def asked(candidate: Scores, other: Scores, against: str, gate: Gate) -> Iterator[Asked]:
    """Non-inferiority on everything that either of the two has: tasks, loss, general loss, and slices by domain.

    A model that reads other tokens has no loss a token. It is compared by bits a byte, with the same margin turned into
    them, and not on the general hold-out.
    """
    tasks = sorted(name for name in {*candidate, *other} if name == "task" or name.startswith("task."))
    plan = [(name, name, gate.task, gate.domain_task) for name in tasks]
    other_tokens = "bits" in other and "nll" not in other
    if other_tokens and "bits" in candidate and "nll" in candidate:
        rate = candidate["nll"].n / candidate["bits"].n / math.log(2)  # tokens a byte, nats to bits
        plan.append(("bits_per_byte", "bits", gate.loss * rate, gate.domain_loss * rate))
    else:
        plan.append(("loss", "nll", gate.loss, gate.domain_loss))
    for metric, source, margin, in_domain in plan:
        one = Asked(
            metric=metric,
            source=source,
            against=against,
            margin=margin,
            a=candidate.get(source),
            b=other.get(source),
        )
        yield one
        yield from _slices(one, in_domain)
    if not other_tokens and ("nll_general" in candidate or "nll_general" in other):
        yield Asked(
            metric="general_loss",
            source="nll_general",
            against=against,
            margin=gate.general_loss,
            a=candidate.get("nll_general"),
            b=other.get("nll_general"),
        )


def better_than_base(candidate: Scores, base: Scores) -> Asked:
    """At the task, or at the loss where no row has a prompt."""
    has_task = "task" in candidate or "task" in base
    source, metric = ("task", "task") if has_task else ("nll", "loss")
    return Asked(metric=metric, source=source, against=BASE, margin=0.0, a=candidate.get(source), b=base.get(source))


def _slices(whole: Asked, margin: float) -> Iterator[Asked]:
    """The same within each domain, where there are several."""
    if whole.obstacle or whole.a is None or whole.b is None:
        return
    domains = sorted({str(name) for name in whole.a.domain})
    for name in domains if len(domains) > 1 else ():
        a, b = whole.a.of_domain(name), whole.b.of_domain(name)
        gates = len(a.rows) >= DOMAIN_ROWS
        yield replace(whole, a=a, b=b, margin=margin, domain=name, gates=gates)


def judge(every: Sequence[Asked], draws: Draw) -> list[Check]:
    """All checks, in their order. Those that gate are one family; the others, which are only shown, another."""
    found: dict[int, Check] = {}
    for gates in (True, False):
        family = [(place, one) for place, one in enumerate(every) if one.gates is gates]
        able = [(place, one) for place, one in family if one.obstacle is None]
        spread = _bootstrapped([one for _, one in able], draws)
        together = difference_intervals(spread)
        for (place, one), boot, adjusted in zip(able, spread, together, strict=True):
            found[place] = _check(one, boot, adjusted)
        for place, one in family:
            found.setdefault(place, _unmade(one))
    return [found[place] for place in range(len(every))]


def outcome_of(checks: Sequence[Check]) -> Outcome:
    """Of all that gate: worse where one is, pass where all are, else undecided."""
    found = {one.outcome for one in checks if one.gates}
    if "worse" in found:
        return "worse"
    return "pass" if found == {"pass"} else "undecided"


def _bootstrapped(family: Sequence[Asked], draws: Draw) -> list[Studentized]:
    """Checks on the same groups share one matrix product."""
    by_groups: dict[tuple[str, ...], list[int]] = {}
    for place, one in enumerate(family):
        assert one.a is not None
        by_groups.setdefault(one.a.groups, []).append(place)
    done: dict[int, Studentized] = {}
    for groups, places in by_groups.items():
        found = studentized([family[place].estimand for place in places], draws(groups))
        done.update(zip(places, found, strict=True))
    return [done[place] for place in range(len(family))]


def _check(one: Asked, boot: Studentized, adjusted: Interval) -> Check:
    assert one.a is not None
    plain = difference_intervals([boot])[0]
    sign = -1.0 if one.is_task else 1.0  # what is lost, not what is gained
    lost, adjusted_lost = _signed(plain, sign), _signed(adjusted, sign)
    outcome: Outcome = "undecided"
    if lost.high < one.margin:
        outcome = "pass"
    elif adjusted_lost.low > one.margin:
        outcome = "worse"
    n = len(one.a.rows)
    return Check(
        metric=one.metric,
        against=one.against,
        margin=one.margin,
        unit=one.unit,
        outcome=outcome,
        difference=boot.estimate,
        ci95=plain,
        ci95_adjusted=adjusted,
        n=n,
        n_needed=_needed(abs(sign * boot.estimate - one.margin), boot, n) if outcome == "undecided" else None,
        domain=one.domain,
        gates=one.gates,
    )


def _signed(interval: Interval, sign: float) -> Interval:
    low, high = sorted((sign * interval.low, sign * interval.high))
    return Interval(low, high)


def _needed(room: float, boot: Studentized, n: int) -> int | None:
    """Rows at which the distance from estimate to margin is as wide as an interval that decides 4 times in 5."""
    if room <= 0:
        return None
    rows = n * max(((Z + Z_POWER) * boot.se / room) ** 2, boot.least / room)  # least falls by 1 / n, se by its root
    return math.ceil(max(rows, n + 1)) if rows <= MOST_ROWS else None


def _unmade(one: Asked) -> Check:
    return Check(
        metric=one.metric,
        against=one.against,
        margin=one.margin,
        unit=one.unit,
        outcome="undecided",
        n=0 if one.a is None else len(one.a.rows),
        domain=one.domain,
        gates=one.gates,
        reason=one.obstacle,
    )


# ---- in words


def told(one: Check) -> str:
    """`task against merged-dequantized: -0.4 [-1.3, +0.5] points, may lose 2: pass`."""
    where = f" in {one.domain}" if one.domain else ""
    name = f"{label(one.metric)}{where} against {one.against}"
    if one.difference is None or one.ci95 is None:
        return f"{name}: undecided, {one.reason}"
    limit = f"may lose {margin(one)}" if one.margin else "has to be better"
    text = f"{name}: {difference(one)}, {limit}: {one.outcome}"
    if not one.gates:
        return f"{text} (shown only: {one.n:,} rows, {DOMAIN_ROWS} gate)"
    if one.outcome != "undecided":
        return text
    return f"{text}; {one.n:,} rows, {_decides(one)}"


def _decides(one: Check) -> str:
    return f"about {one.n_needed:,} would decide" if one.n_needed else "no number of rows like these would decide"


def label(metric: str) -> str:
    """The metric as it is told."""
    return LABELS.get(metric, metric)


def difference(one: Check) -> str:
    """`-0.4 [-1.3, +0.5] points` or `+0.0013 [+0.0002, +0.0024] nats`; the reason where it could not be made."""
    if one.difference is None or one.ci95 is None:
        return str(one.reason)
    scale, unit = (100.0, "points") if one.unit == "share" else (1.0, one.unit)
    shown = [scale * value for value in (one.difference, *one.ci95)]
    half = (shown[2] - shown[1]) / 2
    places = min(6, max(1, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    signed = [f"{value:+.{places}f}" for value in shown]
    plain = [text.replace("+", "").replace("-", "") if not float(text) else text.replace("-", "−") for text in signed]
    return f"{plain[0]} [{plain[1]}, {plain[2]}] {unit}"


def margin(one: Check) -> str:
    """What may be lost: `2 points`, `0.02 nats`."""
    return f"{100 * one.margin:g} points" if one.unit == "share" else f"{one.margin:.3g} {one.unit}"


def restricted(scores: Scores, removed: frozenset[str]) -> dict[str, RowScores]:
    """Without some rows of test; the general hold-out is whole."""
    if not removed:
        return dict(scores)
    gone = np.asarray(sorted(removed))
    return {
        name: rows if name == "nll_general" else rows.where(~np.isin(rows.rows, gone)) for name, rows in scores.items()
    }
