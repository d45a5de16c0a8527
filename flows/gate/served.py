"""What the engine has to say about the candidate: what is promoted has to be served as it was measured.

Only where the run served something. A machine without the engine, or on which it cannot compute the arm, says nothing
about the arm: then the gate decides as it did, and says that nobody tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.gate.candidate import candidate
from flows.gate.checks import Outcome
from flows.results.cells import Draws
from flows.results.read import Run, RunArm
from flows.results.served import arm_text, unserved

NOT_AS_MEASURED: Outcome = "not served as measured"
BY_VERDICT: dict[str, Outcome] = {"served as measured": "pass", "undecided": "undecided"}


def of_engine(arm: RunArm, run: Run, served: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`{outcome, text}` of the candidate; None where the run served nothing. No outcome: it was not tried here.

    Args:
        arm: The candidate.
        run: Its run.
        served: `served` of the report.
    """
    if served is None or not any(other.serve for other in run.arms):
        return None
    if told := served["arms"].get(arm.slug):
        outcome = BY_VERDICT.get(told["verdict"], NOT_AS_MEASURED)
        where = f"In {told['engine']} {told['version']}, {arm_text(arm.slug, told)}"
        return {"outcome": outcome, "text": where}
    if arm.serve is None and arm.unserved:
        return {"outcome": None, "text": f"{arm.slug} was not served here: {arm.unserved.rstrip('.')}."}
    why = unserved(arm, run) or "the run has no step that serves it"
    return {"outcome": NOT_AS_MEASURED, "text": f"{arm.slug} was not served: {why}."}


def together(checks: Outcome, engine: Mapping[str, Any] | None) -> Outcome:
    """The gate's outcome: worse weighs most, then what the engine says, then what is undecided."""
    said = engine["outcome"] if engine else None
    if checks == "worse" or said in (None, "pass"):
        return checks
    return NOT_AS_MEASURED if said == NOT_AS_MEASURED else "undecided"


def excused(run: Run) -> frozenset[str]:
    """Serve steps without an artifact that do not fail the run: those of every arm but the candidate."""
    keys = {arm.serve: arm.slug for arm in run.arms if arm.serve}
    lost = {key: slug for key, slug in keys.items() if (step := run.step(key)) is None or not step.ok}
    if not lost:
        return frozenset()
    named = candidate(run, Draws()).arm
    return frozenset(key for key, slug in lost.items() if named is None or slug != named.slug)
