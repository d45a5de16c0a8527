"""The one arm of a run that may be promoted. It is named on dev: no score of test is read here.

Only the candidate goes through the gate on test. Taking the best of several arms by their test scores would promote the
luckiest one, and the interval that decides would no longer hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flows.gate.checks import Scores, check_text, judge, planned_checks
from flows.results.paired import Draw
from flows.results.read import Run, RunArm
from flows.results.rows import read_dev
from flows.results.sizes import size_bytes
from recipes.schema import Gate

TIE = 0.01  # sizes within 1 % are equal: zero points and metadata of one grid differ by less
RULE = (
    "among the schemes that serve.engine serves and that are within the gate's margins on dev, the fewest bytes; "
    "of sizes within 1 % the higher task score on dev"
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The arm that goes through the gate.

    Attributes:
        arm: None where there is none.
        reason: Why this one, or why none.
        left_out: Other arms that were considered -> why they are not it.
    """

    arm: RunArm | None
    reason: str
    left_out: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Contender:
    arm: RunArm
    size: int
    task: float


def candidate(run: Run, draws: Draw) -> Candidate:
    """`promote.prefer`, or the arm that the rule names on dev."""
    if slug := (run.recipe.get("promote") or {}).get("prefer"):
        return _preferred(run, slug)
    contenders: list[_Contender] = []
    left_out: dict[str, str] = {}
    for arm in run.arms:
        if arm.scheme is None or arm.on_base or arm.is_control or arm.kv or arm.external:
            continue
        contender = _contender(run, arm, draws)
        if isinstance(contender, str):
            left_out[arm.slug] = contender
        else:
            contenders.append(contender)
    if not contenders:
        none = "no scheme of this run is fit for it" if left_out else "no scheme was evaluated in this run"
        return Candidate(arm=None, reason=none, left_out=left_out)
    smallest = min(contender.size for contender in contenders)
    equal = [contender for contender in contenders if contender.size <= smallest * (1 + TIE)]
    best = min(equal, key=lambda contender: (-contender.task, contender.size, contender.arm.slug))
    for contender in contenders:
        if contender is not best:
            worse = f"no higher task score than {best.arm.slug}" if contender in equal else "more bytes"
            left_out[contender.arm.slug] = worse
    return Candidate(arm=best.arm, reason=f"named on dev: {RULE}", left_out=left_out)


def _preferred(run: Run, slug: str) -> Candidate:
    arm = run.arm(slug)
    reason = f"{slug} is no arm of this run" if arm is None else arm.unfit or _unmade(run, arm)
    if reason is not None:
        return Candidate(arm=None, reason=f"promote.prefer names {slug}: {reason}", left_out={})
    return Candidate(arm=arm, reason="named by promote.prefer", left_out={})


def _unmade(run: Run, arm: RunArm) -> str | None:
    for step in (run.step(arm.model), run.step(arm.evaluate)):
        if step is None or not step.ok:
            return step.trouble if step else "the run ended before it was evaluated"
    return None


def _contender(run: Run, arm: RunArm, draws: Draw) -> _Contender | str:
    """The arm with what ranks it, or why it is none. Dev alone is read."""
    if reason := arm.unfit or _unmade(run, arm):
        return reason
    slug = f"merged-{arm.merge_base}"
    merged = run.arm(slug)
    reason = _unmade(run, merged) if merged else "it is not in this run"
    if merged is None or reason:
        return f"{slug}, which it is compared with: {reason}"
    own, other = _dev(run, arm), _dev(run, merged)
    planned = [check for check in planned_checks(own, other, slug, margins_of(run)) if check.domain is None]
    for check in judge(planned, draws):
        if check.outcome != "pass":
            return f"on dev, {check_text(check)}"
    size, reason = size_bytes(arm, run)
    if size is None:
        return str(reason)
    task = own["task"].sums.value if "task" in own else 0.0
    return _Contender(arm=arm, size=size, task=task)


def _dev(run: Run, arm: RunArm) -> Scores:
    scored = run.step(arm.evaluate)
    assert scored is not None and scored.files is not None  # _unmade has seen it
    return read_dev(scored.files)


def margins_of(run: Run) -> Gate:
    """The recipe's `gate:`; of a run that is older than it, the defaults."""
    return Gate.model_validate(run.recipe.get("gate") or {})
