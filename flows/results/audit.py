"""Published claims, one by one and as one table: what their numbers can bear (flows/results/unpaired.py says how)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flows.results.stats import Interval, Z, wilson
from flows.results.unpaired import (
    Counted,
    Figure,
    Verdict,
    counted,
    discordant,
    judged,
    paired_interval,
    together_z,
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of a table of claims.

    Attributes:
        line: Of the file.
        n: Questions.
        score, base: Shares of right answers, or means where `sd` is given; None where only a difference is published.
        lost: Score after what was lost and before what came back.
        gain: score - lost, where that is all that is published.
        recovery: As it was stated, as a share.
        sd, base_sd: Of the scores of single rows.
    """

    line: int
    name: str
    metric: str
    n: int
    score: Figure | None = None
    base: Figure | None = None
    lost: Figure | None = None
    gain: Figure | None = None
    recovery: float | None = None
    sd: float | None = None
    base_sd: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How many of the questions that were lost came back, and whether either number can be shown.

    Attributes:
        returned, lost: Questions; None where the figures fit no number of them.
        stated: As it was published; value: as it follows from the counts.
        reason: Why nothing can be said of it.
    """

    stated: float | None
    value: float | None = None
    returned: int | None = None
    lost: int | None = None
    loss: Verdict | None = None
    gain: Verdict | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What a claim's numbers can bear.

    Attributes:
        score_ci95, base_ci95: Wilson's intervals; of means those of the mean.
        count, base_count: Right answers; None for means and where only a difference is published.
        difference: score - base, or the gain; a share, or in the metric's own unit.
        questions: The same in questions; None for means.
        narrowest, widest: Interval of the difference at the two ends of what the pairing can be.
        unrelated: Questions on which two models that answer independently of each other would agree.
        verdict: At 95 %; together: at the level that holds for all rows of the table.
        rounding: The verdict would be another one with other counts that round to what is written: that verdict.
    """

    claim: Claim
    difference: float
    questions: int | None
    narrowest: Interval
    widest: Interval
    verdict: Verdict
    together: Verdict
    score_ci95: Interval | None = None
    base_ci95: Interval | None = None
    count: Counted | None = None
    base_count: Counted | None = None
    unrelated: float | None = None
    rounding: Verdict | None = None
    recovery: Recovery | None = None


# ---- a table


def audited(claims: Sequence[Claim]) -> list[Audited]:
    """Every claim, alone and as one of all."""
    z = together_z(len(claims))
    return [_one(claim, z) for claim in claims]


def _one(claim: Claim, z: float) -> Audited:
    if claim.sd is not None:
        return _means(claim, claim.sd, z)
    return _shares(claim, z) if claim.score and claim.base else _gain(claim, z)


def _shares(claim: Claim, z: float) -> Audited:
    assert claim.score and claim.base
    n, score, base = claim.n, counted(claim.score, claim.n), counted(claim.base, claim.n)
    d, (fewest, most) = score.nearest - base.nearest, discordant(score.nearest, base.nearest, n)
    near, far = (_at(score, base, n, apart=apart) for apart in (False, True))
    verdict, other = (judged(end.d, n, end.most) for end in (near, far))
    return Audited(
        claim=claim,
        difference=float(claim.score.value - claim.base.value),
        questions=d,
        narrowest=paired_interval(d, fewest, n),
        widest=paired_interval(d, most, n),
        verdict=verdict,
        together=judged(near.d, n, near.most, z),
        score_ci95=wilson(score.nearest / n, n),
        base_ci95=wilson(base.nearest / n, n),
        count=score,
        base_count=base,
        unrelated=n - (score.nearest * (n - base.nearest) + base.nearest * (n - score.nearest)) / n,
        rounding=other if other.outcome != verdict.outcome else None,
        recovery=_recovery(claim, score.nearest, base.nearest),
    )


class _Ends(NamedTuple):
    d: int
    most: int


def _at(score: Counted, base: Counted, n: int, *, apart: bool) -> _Ends:
    """The difference where rounding brings the two as near to each other, or as far apart, as it can."""
    up = score.nearest >= base.nearest
    x, y = (score.high, base.low) if up == apart else (score.low, base.high)
    if (x >= y) != up:
        x = y  # they may be equal
    return _Ends(x - y, discordant(x, y, n)[1])


def _gain(claim: Claim, z: float) -> Audited:
    """Only a difference is published: any number of questions may differ."""
    assert claim.gain
    n, gain = claim.n, counted(claim.gain, claim.n)
    d = gain.nearest
    most = _most(d, n)
    return Audited(
        claim=claim,
        difference=float(claim.gain.value),
        questions=d,
        narrowest=paired_interval(d, abs(d), n),
        widest=paired_interval(d, most, n),
        verdict=judged(d, n, most),
        together=judged(d, n, most, z),
        count=gain,
        recovery=_recovery_of_gain(claim, d),
    )


def _means(claim: Claim, sd: float, z: float) -> Audited:
    """Means of rows whose standard deviation is known: the correlation of the two stands for the pairing."""
    assert claim.score and claim.base
    other = sd if claim.base_sd is None else claim.base_sd
    root, difference = math.sqrt(claim.n), float(claim.score.value - claim.base.value)

    def around(value: float, spread: float) -> Interval:
        return Interval(value - Z * spread / root, value + Z * spread / root)

    def judge(critical: float) -> Verdict:
        limit = (abs(difference) * root / critical) ** 2  # the most that the variance of a row's difference may be
        if limit <= (sd - other) ** 2 or difference == 0:
            return Verdict("cannot")
        if limit > (sd + other) ** 2:
            return Verdict("shown")
        return Verdict("depends", correlation=(sd**2 + other**2 - limit) / (2 * sd * other))

    return Audited(
        claim=claim,
        difference=difference,
        questions=None,
        narrowest=around(difference, abs(sd - other)),
        widest=around(difference, sd + other),
        verdict=judge(Z),
        together=judge(z),
        score_ci95=around(float(claim.score.value), sd),
        base_ci95=around(float(claim.base.value), other),
    )


# ---- recovery


def _recovery(claim: Claim, score: int, base: int) -> Recovery | None:
    """Of a claim with both scores; None where no recovery is claimed."""
    if claim.lost is not None:
        return _came_back(claim, score, base, counted(claim.lost, claim.n).nearest)
    if claim.recovery is None:
        return None
    if base and abs(claim.recovery - score / base) < 0.0015:  # both are rounded to a tenth of a per cent
        reason = "it is score / base score, no share of what was lost: the score after the loss is not given"
        return Recovery(stated=claim.recovery, value=score / base, reason=reason)
    lost = (score - claim.recovery * base) / (1 - claim.recovery) if claim.recovery != 1 else -1.0
    if not 0 <= round(lost) <= claim.n or round(lost) == base:
        return Recovery(stated=claim.recovery, reason="no score after the loss goes with it and with these two scores")
    return _came_back(claim, score, base, round(lost))


def _came_back(claim: Claim, score: int, base: int, lost: int) -> Recovery:
    n = claim.n

    def judge(x: int, y: int) -> Verdict:
        return judged(x - y, n, discordant(x, y, n)[1])

    if base == lost:
        return Recovery(stated=claim.recovery, reason="nothing was lost, so nothing can come back")
    return Recovery(
        stated=claim.recovery,
        value=(score - lost) / (base - lost),
        returned=score - lost,
        lost=base - lost,
        loss=judge(base, lost),
        gain=judge(score, lost),
    )


def _recovery_of_gain(claim: Claim, returned: int) -> Recovery | None:
    """Of a claim that gives the gain and the recovery alone."""
    if claim.recovery is None:
        return None
    lost = round(returned / claim.recovery) if claim.recovery else 0
    if not 0 < abs(lost) <= claim.n:
        return Recovery(stated=claim.recovery, reason="no number of lost questions goes with it and with this gain")
    return Recovery(
        stated=claim.recovery,
        value=returned / lost,
        returned=returned,
        lost=lost,
        loss=judged(lost, claim.n, _most(lost, claim.n)),
        gain=judged(returned, claim.n, _most(returned, claim.n)),
    )


def _most(d: int, n: int) -> int:
    """Most questions that can differ where the scores themselves are unknown."""
    return n - (n - d) % 2


def as_dict(one: Audited) -> dict[str, Any]:
    """JSON-able; words stand beside it (flows/commands/audit.py)."""
    recovery = one.recovery
    return {
        "line": one.claim.line,
        "name": one.claim.name,
        "metric": one.claim.metric,
        "n": one.claim.n,
        "kind": "mean" if one.claim.sd is not None else "share",
        "score": one.claim.score and float(one.claim.score.value),
        "base_score": one.claim.base and float(one.claim.base.value),
        "score_ci95": one.score_ci95 and list(one.score_ci95),
        "base_ci95": one.base_ci95 and list(one.base_ci95),
        "count": one.count and one.count._asdict(),
        "base_count": one.base_count and one.base_count._asdict(),
        "difference": one.difference,
        "questions": one.questions,
        "narrowest": list(one.narrowest),
        "widest": list(one.widest),
        "agree_if_unrelated": one.unrelated,
        "verdict": one.verdict._asdict(),
        "together": one.together._asdict(),
        "rounding": one.rounding and one.rounding._asdict(),
        "recovery": recovery
        and {
            **vars(recovery),
            "loss": recovery.loss and recovery.loss._asdict(),
            "gain": recovery.gain and recovery.gain._asdict(),
        },
    }
