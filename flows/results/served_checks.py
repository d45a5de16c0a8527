"""The rule that says whether an arm is served as it was measured, and why it is this one.

Two engines never give the same numbers: they round in another order. So each difference between an engine and the
report (served - own, on the rows of test that both have) stands beside the **floor**: the same difference of
merged-dequantized, where no quantization is between the two. Three checks decide. Each has a part that convicts (the
interval that holds over all served arms lies wholly beyond the limit) and a part that acquits; between them, undecided.

* loss: the mean difference, nats a token. It differs beyond 0.0005 (a fortieth of the gate's default margin for the
  loss) and what the floor's loss is off. It passes where it is less and its own interval stays within 0.002,
  a tenth of that margin: what is not excluded then is too small for any decision of the gate. Rounding has a mean near
  zero, so it passes. So does a fault that helps some rows as much as it hurts others: hence the next.
* rows: the mean absolute difference of a row, nats a token, against the floor's. Here neither noise nor fault cancels.
  It differs where it is shown to be more than 1.5 times the floor's and 0.0001 nats. Why 1.5: a quantized kernel rounds
  what the floor's rounds, and may round its dequantized weights once more; two independent errors of one size are 1.41
  of one. Why 0.0001, a fifth of the band: else a floor of exactly zero would forbid any rounding. Squares would see a
  normal error a little sooner, but one wild row in a thousand decides them.
* answers: the share of greedy answers that are not the arm's own text, against the floor's. A decoding kernel is not
  the kernel of the loss, and only answers see it. With twice the noise an answer has two chances to change where the
  floor's had one: of a share p that is p (1 - p) more, or 2 points where that is less (the gate's default margin of a
  task). It differs where more is shown. It passes where 10 points more are excluded (or p (1 - p), where that is more):
  a broken decoder changes more than that, and where no answer changed 36 rows exclude it.

The last two have no standard but the floor. Where it was not served, or itself differs (then it is no floor, and
excuses nothing), the loss alone decides, against the plain band. So it does for the floor itself. Few rows leave loss
or answers undecided, and undecided is not "as measured".

What it cannot see is what rounding hides. On a model of 6 layers of 256, with a loss of 4.3, and two engines imitated
in fp32 by rounding to bf16 behind every module or behind linear layers alone (350 rows): the floor's rows are off by
0.0021 nats, those of a right gptq-w4-g128 by 0.0020. One zero point (128 weights) off by one step leaves 0.0020 to
0.0023: nothing tells it from rounding. Off by eight steps, in eight places: 0.0023 to 0.0054, of which five differ, two
are undecided and one passes. All zero points of one group of inputs off by one: 0.008 and 0.015, and both differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from flows.results.paired import Difference, Draw, Obstacle, Paired, differences, paired, why_not
from flows.results.rows import RowScores
from flows.results.stats import Interval, Link

Outcome = Literal["pass", "differs", "undecided"]
Verdict = Literal["served as measured", "differs by more than the floor", "undecided", "not served"]
Name = Literal["loss", "rows", "answers"]

BAND = 0.0005  # nats a token: a fortieth of gate.loss
EXCLUDED = 0.002  # nats a token: a tenth of gate.loss
NOISE = 1.5  # times the floor's: see `rows` above
ALLOWED = 0.0001  # nats a token, beside that
CHANGED = 0.02  # of the answers: gate.task
MOST_CHANGED = 0.10  # of the answers
PAIRS = {"served_nll": "nll", "served_task": "task"}  # what the engine gave -> what the arm's own evaluation gave
OBSTACLES: dict[Obstacle, str] = {
    "missing": "it and the floor do not both have such scores",
    "other rows": "it and the floor have no common rows with the same tokens",
}


class ServedScores(NamedTuple):
    """What an arm scored in the engine and in its own evaluation, by metric of scores.parquet."""

    served: Mapping[str, RowScores]
    own: Mapping[str, RowScores]

    def pair(self, metric: str) -> Paired | str:
        """Served - own on the rows that both have, or why there is none."""
        a, b = self.served.get(metric), self.own.get(PAIRS[metric])
        if a is not None and b is not None:
            a, b = shared(a, b)
        pair = paired(a, b, "share" if metric == "served_task" else "mean")
        if isinstance(pair, Paired):
            return pair
        broken = sum(int((~np.isfinite(rows.total)).sum()) for rows in (a, b) if rows is not None)
        own: dict[Obstacle, str] = {
            "missing": f"no {metric} rows" if a is None else f"its own evaluation has no {PAIRS[metric]} rows",
            "other rows": "the engine and the evaluation have no common rows with the same tokens",
            "not finite": f"{broken} rows have no finite score",
        }
        return why_not(pair, a, own)

    @property
    def apart(self) -> RowScores | None:
        """Absolute difference of each row's loss; None where the losses cannot be paired."""
        pair = self.pair("served_nll")
        return replace(pair.a, total=np.abs(pair.a.total - pair.b.total)) if isinstance(pair, Paired) else None

    @property
    def changed(self) -> RowScores | None:
        """1 where the engine's answer is not the arm's own; None without answers."""
        rows = self.served.get("served_equal")
        return replace(rows, total=1.0 - rows.total) if rows is not None else None


def shared(a: RowScores, b: RowScores) -> tuple[RowScores, RowScores]:
    """Both on the rows that both have; empty ones where there is none."""
    both = np.intersect1d(a.rows, b.rows)
    return a.where(np.isin(a.rows, both)), b.where(np.isin(b.rows, both))


@dataclass(frozen=True, kw_only=True)
class ServedCheck:
    """One check of an arm.

    Attributes:
        difference: loss: served - own. rows: mean absolute difference - `limit`. answers: changed share -
            the floor's. None where it could not be made, and `reason` says why.
        value: What is judged: the difference, the mean absolute difference, the changed share.
        floor: The floor's value; None where it has no say.
        limit: Beyond it, it differs: nats a token of `value`; answers: so much of their share above the floor's.
        n: Rows.
    """

    name: Name
    outcome: Outcome
    difference: float | None = None
    ci95: Interval | None = None
    ci95_adjusted: Interval | None = None
    value: float | None = None
    floor: float | None = None
    limit: float | None = None
    n: int = 0
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        intervals = {name: getattr(self, name) and list(getattr(self, name)) for name in ("ci95", "ci95_adjusted")}
        return {**vars(self), **intervals}


class Judged(NamedTuple):
    """Checks by arm, the floor's slug where it has a say, and why it has none."""

    checks: dict[str, list[ServedCheck]]
    floor: str | None
    no_floor: str | None


def judge_served(arms: Mapping[str, ServedScores], floor: str, draws: Draw) -> Judged:
    """All checks of all served arms; their adjusted intervals hold together.

    Args:
        arms: Every served arm with its scores, the floor among them where it was served.
        floor: Slug of the floor.
        draws: The resamples of some groups; equal groups get equal draws.
    """
    plan: dict[tuple[str, Name], Paired | str] = {
        (slug, name): pair
        for slug, scores in arms.items()
        for name, pair in _pairs(scores, arms.get(floor) if slug != floor else None).items()
    }
    able = {place: pair for place, pair in plan.items() if isinstance(pair, Paired)}
    made = dict(zip(able, differences(list(able.values()), draws), strict=True))
    own = made.get((floor, "loss"))
    no_floor = _no_floor(floor, plan.get((floor, "loss")), own)
    moved = abs(own.estimate) if own is not None and no_floor is None else 0.0
    checks: dict[str, list[ServedCheck]] = {slug: [] for slug in arms}
    for (slug, name), pair in plan.items():
        if name == "loss" or no_floor is None:
            checks[slug].append(_check(name, pair, made.get((slug, name)), moved=0.0 if slug == floor else moved))
    return Judged(checks, floor if no_floor is None else None, no_floor)


def _pairs(scores: ServedScores, floor: ServedScores | None) -> dict[Name, Paired | str]:
    """The checks that an arm is judged by; where no row has a prompt there is no answer to compare."""
    pairs: dict[Name, Paired | str] = {"loss": scores.pair("served_nll")}
    if floor is None:
        return pairs
    pairs["rows"] = _against(scores.apart, floor.apart, times=NOISE, more=ALLOWED)
    if scores.changed is not None or floor.changed is not None:
        pairs["answers"] = _against(scores.changed, floor.changed, link="share")
    return pairs


def _against(
    a: RowScores | None, floor: RowScores | None, *, times: float = 1.0, more: float = 0.0, link: Link = "mean"
) -> Paired | str:
    """An arm and so many times the floor, and so much more a token, on the rows that both have; or why not."""
    if a is not None and floor is not None:
        a, floor = shared(a, floor)
        floor = replace(floor, total=times * floor.total + more * floor.count)
    pair = paired(a, floor, link)
    return pair if isinstance(pair, Paired) else why_not(pair, a, OBSTACLES)


def _no_floor(floor: str, pair: Paired | str | None, own: Difference | None) -> str | None:
    """Why the floor has no say; None where it has."""
    if pair is None:
        return f"{floor} was not served"
    if own is None:
        return f"{floor} is no floor: {pair}"
    low, high = own.ci95_adjusted
    if low > BAND or high < -BAND:
        return f"{floor} is no floor: the engine gives another loss than its own evaluation"
    return None


def _check(name: Name, pair: Paired | str, difference: Difference | None, *, moved: float) -> ServedCheck:
    """A check with its outcome; `moved` is how far the floor's loss is off."""
    if isinstance(pair, str) or difference is None:
        return ServedCheck(name=name, outcome="undecided", reason=str(pair))
    value, other = pair.a.sums.value, pair.b.sums.value
    check = ServedCheck(
        name=name,
        outcome="undecided",
        difference=difference.estimate,
        ci95=difference.ci95,
        ci95_adjusted=difference.ci95_adjusted,
        value=difference.estimate if name == "loss" else value,
        n=len(pair.a.rows),
    )
    own, together = difference.ci95, difference.ci95_adjusted
    if name == "loss":
        limit = BAND + moved
        differs = together.low > limit or together.high < -limit
        passes = abs(difference.estimate) <= limit and own.low > -EXCLUDED and own.high < EXCLUDED
        return replace(check, limit=limit, outcome=_word(differs, passes))
    if name == "rows":
        floor = max(other - ALLOWED, 0.0) / NOISE
        return replace(check, limit=other, floor=floor, outcome=_word(together.low > 0, own.high < 0))
    limit = max(CHANGED, other * (1 - other))
    outcome = _word(together.low > limit, own.high < max(MOST_CHANGED, limit))
    return replace(check, limit=limit, floor=other, outcome=outcome)


def _word(differs: bool, passes: bool) -> Outcome:
    return "differs" if differs else "pass" if passes else "undecided"


def verdict_of(checks: Sequence[ServedCheck]) -> Verdict:
    """Differs where one check does, as measured where all pass."""
    outcomes = {check.outcome for check in checks}
    if "differs" in outcomes:
        return "differs by more than the floor"
    return "served as measured" if outcomes == {"pass"} else "undecided"
