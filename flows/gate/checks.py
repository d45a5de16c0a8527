"""The gate: is the candidate, on test, no worse than what it was made from and what it would replace?

Each check is a difference (candidate - other) with a paired bootstrap interval and a margin from the recipe's `gate:`.
The interval's level is 95 % for the first candidate that a set of test rows judges, and higher for later ones
(flows/gate/looks.py). Slices by domain stay at 95 %: they are a second net with wider margins, and 200 rows cannot
resolve 5 points at 99.9 %, so models that are equal would hardly ever pass.

* pass: the whole interval lies within the margin, of a task also Tango's score interval, which keeps what it promises
  where few answers changed (flows/results/score_interval.py). A candidate passes where every check does, so each is
  made at that level by itself: a model that is too bad in one respect has to get through that check, and does so in
  2.5 % at most, however many others there are (intersection-union, Berger 1982, Technometrics 24:295).
* worse: the interval that holds together over all checks, at the same level, lies wholly beyond the margin.
* undecided: anything else, also a check that cannot be made. It blocks like worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from flows.gate.looks import level_text
from flows.gate.score import Score
from flows.results.flips import flips_json, flips_text
from flows.results.paired import Difference, Draw, Obstacle, Paired, differences, paired, why_not
from flows.results.rows import RowScores
from flows.results.stats import LEVEL, Z_POWER, Interval, Link, Studentized, critical_of
from recipes.checks.power import DOMAIN_ROWS, MOST_ROWS
from recipes.schema import Gate

Outcome = Literal["pass", "worse", "undecided", "none", "not served as measured"]
Unit = Literal["share", "nats", "bits"]  # a share of the answers, nats per token, bits per byte
Scores = Mapping[str, RowScores]  # metric of scores.parquet -> rows
BASE = "base"
BEST = "the best version"  # of the chain before the candidate
INTERVALS = ("ci95", "ci95_adjusted", "ci_level", "ci_level_adjusted")
LABELS = {"general_loss": "general loss", "bits_per_byte": "bits a byte"}


@dataclass(frozen=True, kw_only=True)
class PlannedCheck:
    """One check before its interval is known.

    Attributes:
        metric: `task`, `task.NAME`, `loss`, `general_loss` or `bits_per_byte`.
        source: Metric of scores.parquet.
        against: Arm, `champion`, or `the best version` of the chain.
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
    def rows(self) -> Paired | str:
        """The rows of both, or why the check cannot be made."""
        pair = paired(self.a, self.b, self.link)
        if isinstance(pair, Paired):
            return pair
        own: dict[Obstacle, str] = {
            "missing": f"{'candidate' if self.a is None else self.against} has no such scores",
            "other device": "the two were scored on different devices",
            "other rows": "the two were not scored on the same rows and tokens",
        }
        return why_not(pair, self.a, own)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check with its outcome.

    Attributes:
        difference: Candidate - other; None where it could not be made, and `reason` says why.
        level: Of the intervals that decide, `ci_level` (pass) and `ci_level_adjusted` (worse).
        n: Rows behind it.
        n_needed: Rows that would decide it 4 times in 5, if the difference stays as it is; None where it is decided,
            or no number of rows up to ten million would.
        flips: Of a task: answers lost and gained, and McNemar's p; None of other metrics, and where nobody counted.
    """

    metric: str
    against: str
    margin: float
    unit: Unit
    outcome: Outcome
    difference: float | None = None
    ci95: Interval | None = None
    ci95_adjusted: Interval | None = None
    level: float = LEVEL
    ci_level: Interval | None = None
    ci_level_adjusted: Interval | None = None
    n: int = 0
    n_needed: int | None = None
    domain: str | None = None
    gates: bool = True
    reason: str | None = None
    flips: dict[str, Any] | None = None

    @property
    def is_share(self) -> bool:
        """Of the answers: higher is better."""
        return self.unit == "share"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        intervals = {name: ends and list(ends) for name in INTERVALS for ends in [getattr(self, name)]}
        return {**vars(self), **intervals, "text": check_text(self)}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Check:
        """From a check of report.json."""
        return cls(**{name: value for name, value in line.items() if name != "text"})


def planned_checks(candidate: Scores, other: Scores, against: str, gate: Gate) -> Iterator[PlannedCheck]:
    """Non-inferiority on everything that either of the two has: tasks, loss, general loss, and slices by domain.

    A model that reads other tokens has no loss per token. It is compared by bits per byte, with the same margin turned
    into them, and not on the general hold-out.
    """

    def check(metric: str, source: str, margin: float) -> PlannedCheck:
        a, b = candidate.get(source), other.get(source)
        return PlannedCheck(metric=metric, source=source, against=against, margin=margin, a=a, b=b)

    for name in sorted(name for name in {*candidate, *other} if name == "task" or name.startswith("task.")):
        yield from _with_slices(check(name, name, gate.task), gate.domain_task)
    other_tokens = "bits" in other and "nll" not in other
    if other_tokens and "bits" in candidate and "nll" in candidate:
        rate = candidate["nll"].n / candidate["bits"].n / math.log(2)  # tokens a byte, nats to bits
        yield from _with_slices(check("bits_per_byte", "bits", gate.loss * rate), gate.domain_loss * rate)
    else:
        yield from _with_slices(check("loss", "nll", gate.loss), gate.domain_loss)
    if not other_tokens and ("nll_general" in candidate or "nll_general" in other):
        yield check("general_loss", "nll_general", gate.general_loss)


def better_than_base(candidate: Scores, base: Scores) -> PlannedCheck:
    """At the task, or at the loss where no row has a prompt."""
    has_task = "task" in candidate or "task" in base
    source, metric = ("task", "task") if has_task else ("nll", "loss")
    a, b = candidate.get(source), base.get(source)
    return PlannedCheck(metric=metric, source=source, against=BASE, margin=0.0, a=a, b=b)


def _with_slices(whole: PlannedCheck, margin: float) -> Iterator[PlannedCheck]:
    """A check, and the same within each domain where there are several."""
    yield whole
    pair = whole.rows
    if not isinstance(pair, Paired):
        return
    domains = sorted({str(name) for name in pair.a.domain})
    for name in domains if len(domains) > 1 else ():
        a, b = pair.a.of_domain(name), pair.b.of_domain(name)
        gates = len(a.rows) >= DOMAIN_ROWS
        yield replace(whole, a=a, b=b, margin=margin, domain=name, gates=gates)


def judge(checks: Sequence[PlannedCheck], draws: Draw, *, level: float = LEVEL) -> list[Check]:
    """All checks, in their order. Those that gate are one family; the others, which are only shown, another.

    Args:
        checks: As planned.
        draws: The resamples of some groups.
        level: Of the intervals that decide.
    """
    judged: dict[int, Check] = {}
    for gates in (True, False):
        family = {place: check for place, check in enumerate(checks) if check.gates is gates}
        pairs = {place: check.rows for place, check in family.items()}
        able = {place: pair for place, pair in pairs.items() if isinstance(pair, Paired)}
        found = dict(zip(able, differences(list(able.values()), draws, level=level), strict=True))
        judged |= {place: _check(check, found.get(place), level) for place, check in family.items()}
    return [judged[place] for place in range(len(checks))]


def outcome_of(checks: Sequence[Check]) -> Outcome:
    """Of all that gate: worse where one is, pass where all are, else undecided."""
    outcomes = {check.outcome for check in checks if check.gates}
    if "worse" in outcomes:
        return "worse"
    return "pass" if outcomes == {"pass"} else "undecided"


def _check(planned: PlannedCheck, difference: Difference | None, level: float) -> Check:
    """The check with its outcome; without a difference it could not be made, and says why."""
    n = 0 if planned.a is None else len(planned.a.rows)
    check = Check(
        metric=planned.metric,
        against=planned.against,
        margin=planned.margin,
        unit=planned.unit,
        outcome="undecided",
        n=n,
        domain=planned.domain,
        gates=planned.gates,
    )
    if difference is None:
        return replace(check, reason=str(planned.rows))
    own, together = (difference.ci_level, difference.ci_level_adjusted)
    if planned.domain is not None:
        level, own, together = LEVEL, difference.ci95, difference.ci95_adjusted
    pair = planned.rows
    score = Score.of(pair, difference.boot, level) if planned.is_task and isinstance(pair, Paired) else None
    own = score.with_bootstrap(own) if score else own
    sign = -1.0 if planned.is_task else 1.0  # what is lost, not what is gained
    outcome: Outcome = "undecided"
    if _signed(own, sign).high < planned.margin:
        outcome = "pass"
    elif _signed(together, sign).low > planned.margin:
        outcome = "worse"
    room = abs(sign * difference.estimate - planned.margin)
    return replace(
        check,
        outcome=outcome,
        difference=difference.estimate,
        ci95=difference.ci95,
        ci95_adjusted=difference.ci95_adjusted,
        level=level,
        ci_level=own,
        ci_level_adjusted=together,
        n_needed=_needed(room, difference.boot.at_level(level), n, level, score, planned.margin)
        if outcome == "undecided"
        else None,
        flips=flips_json(pair) if planned.is_task and isinstance(pair, Paired) else None,
    )


def _signed(interval: Interval, sign: float) -> Interval:
    low, high = sorted((sign * interval.low, sign * interval.high))
    return Interval(low, high)


def _needed(room: float, boot: Studentized, n: int, level: float, score: Score | None, margin: float) -> int | None:
    """Rows at which the distance from estimate to margin is as wide as an interval that decides 4 times in 5."""
    if room <= 0:
        return None
    wide = (critical_of(level) + Z_POWER) * boot.se
    rows = n * max((wide / room) ** 2, boot.least / room)  # least falls by 1 / n, se by its root
    rows = max(rows, score.needed(margin, room) if score else 0)
    return math.ceil(max(rows, n + 1)) if rows <= MOST_ROWS else None


# ---- in words


def check_text(check: Check) -> str:
    """`task against merged-dequantized: -0.4 [-1.3, +0.5] points, may lose 2: pass`."""
    where = f" in {check.domain}" if check.domain else ""
    name = f"{label(check.metric)}{where} against {check.against}"
    if check.difference is None or check.ci95 is None:
        return f"{name}: undecided, {check.reason}"
    limit = f"may lose {margin_text(check)}" if check.margin else "has to be better"
    flipped = flips_text(check.flips)
    text = f"{name}: {difference_of(check)}{f' ({flipped})' if flipped else ''}, {limit}: {check.outcome}"
    if not check.gates:
        return f"{text} (shown only: {check.n:,} rows, {DOMAIN_ROWS} gate)"
    if check.outcome != "undecided":
        return text
    more = f"about {check.n_needed:,} would decide" if check.n_needed else "no number of rows like these would decide"
    return f"{text}; {check.n:,} rows, {more}"


def label(metric: str) -> str:
    """The metric in words."""
    return LABELS.get(metric, metric)


def difference_of(check: Check) -> str:
    """`-0.4 [-1.3, +0.5] points`, `+0.001 [-0.002, +0.004] nats at 99.9 %`; the reason where it could not be made."""
    if check.difference is None or check.ci95 is None:
        return str(check.reason)
    scale, unit = (100.0, "points") if check.unit == "share" else (1.0, check.unit)
    shown = [scale * value for value in (check.difference, *(check.ci_level or check.ci95))]
    half = round((shown[2] - shown[1]) / 2, 9)  # 1, not 0.9999999999
    places = min(6, max(1, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    signed = [f"{value:+.{places}f}" for value in shown]
    plain = [text.replace("+", "").replace("-", "") if not float(text) else text.replace("-", "−") for text in signed]
    at = f" at {level_text(check.level)}" if check.level != LEVEL else ""
    return f"{plain[0]} [{plain[1]}, {plain[2]}] {unit}{at}"


def margin_text(check: Check) -> str:
    """What may be lost: `2 points`, `0.02 nats`."""
    return f"{100 * check.margin:g} points" if check.unit == "share" else f"{check.margin:.3g} {check.unit}"


def restricted(scores: Scores, removed: frozenset[str]) -> dict[str, RowScores]:
    """Without some rows of test; the general hold-out is whole."""
    if not removed:
        return dict(scores)
    gone = np.asarray(sorted(removed))
    return {
        name: rows if name == "nll_general" else rows.where(~np.isin(rows.rows, gone)) for name, rows in scores.items()
    }
