"""The report's `gate`: candidate, every check on test, outcome, and all of it in words.

Pure: a champion takes part where `quench promote` has evaluated it on this run's rows and left promotion.json behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flows.gate.candidate import candidate, margins_of
from flows.gate.checks import BASE, PlannedCheck, better_than_base, judge, outcome_of, planned_checks, restricted
from flows.gate.served import NOT_AS_MEASURED, of_engine, together
from flows.gate.truncated import truncated_of
from flows.results.cells import ArmEvidence
from flows.results.paired import Draw
from flows.results.read import Run, RunArm
from flows.results.rows import read_scores
from recipes.arms import CHAMPION
from recipes.schema import Gate

PROMOTION = "promotion.json"  # in the run's folder; flows/promotion/promote.py writes it
OUTCOMES = {
    "pass": "passes the gate",
    "worse": "does not pass the gate: it is worse",
    "undecided": "does not pass the gate: this much data cannot tell",
    NOT_AS_MEASURED: "does not pass the gate: what the engine serves is not what was measured",
}


def gate_of(
    run: Run, evidence: Mapping[str, ArmEvidence], draws: Draw, *, served: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything about promotion that report.json says; `served` is what it says of the engine."""
    margins, chosen, champion = margins_of(run), candidate(run, draws), _champion(run)
    arm = chosen.arm
    same = champion is not None and arm is not None and _digest(run, arm) == champion["digest"]
    planned = _planned(arm, evidence, margins, None if same else champion, run) if arm else ()
    checks = judge(list(planned), draws)
    engine = of_engine(arm, run, served) if arm else None
    cut = truncated_of(evidence[arm.slug].scores) if arm else None
    compared = any(check.against == CHAMPION for check in checks)
    section = {
        "candidate": arm.slug if arm else None,
        "reason": chosen.reason,
        "left_out": dict(chosen.left_out),
        "outcome": together(outcome_of(checks), engine) if arm else "none",
        "margins": margins.model_dump(),
        "tests": [check.as_dict() for check in checks if check.domain is None],
        "domains": [check.as_dict() for check in checks if check.domain is not None],
        **({"served": engine} if engine else {}),
        **({"truncated": cut} if cut else {}),
        "champion": champion and _shown(champion, compared=compared, same=same),
    }
    return {**section, "text": list(sentences(section))}


def _planned(
    arm: RunArm, evidence: Mapping[str, ArmEvidence], margins: Gate, champion: Mapping[str, Any] | None, run: Run
) -> Iterator[PlannedCheck]:
    """The candidate against what it was made from, the base, and what it would replace."""
    own = evidence[arm.slug].scores
    if arm.scheme is not None:  # a merged model is not compared with itself
        merged = f"merged-{arm.merge_base}"
        yield from planned_checks(own, evidence[merged].scores if merged in evidence else {}, merged, margins)
    if margins.better_than_base:
        yield better_than_base(own, evidence[BASE].scores if BASE in evidence else {})
    if champion is not None:
        files = run.home / champion["evaluate"] / "files"
        removed = frozenset(champion["removed"])
        theirs = read_scores(files) if files.is_dir() else {}  # without its scores nothing is decided
        yield from planned_checks(restricted(own, removed), restricted(theirs, removed), CHAMPION, margins)


def _champion(run: Run) -> dict[str, Any] | None:
    path = run.folder / PROMOTION
    return json.loads(path.read_text(encoding="utf-8"))["champion"] if path.exists() else None


def _digest(run: Run, arm: RunArm) -> str | None:
    step = run.step(arm.model)
    return step.manifest["digest"] if step and step.manifest else None


def _shown(champion: Mapping[str, Any], *, compared: bool, same: bool) -> dict[str, Any]:
    named = {name: champion[name] for name in ("model", "version", "run", "arm", "digest", "evaluate", "rows", "note")}
    return {**named, "removed": len(champion["removed"]), "same": same, "compared": compared}


def sentences(section: Mapping[str, Any]) -> Iterator[str]:
    """All of `gate` in words: the verdict, then the checks that did not pass, the worse ones first."""
    if section["candidate"] is None:
        yield f"Nothing can be promoted: {section['reason']}."
        yield from (f"{slug}: {why.rstrip('.')}." for slug, why in section["left_out"].items())
        return
    gating = [check for check in (*section["tests"], *section["domains"]) if check["gates"]]
    not_passed = [check for check in gating if check["outcome"] != "pass"]
    passed = f"{len(gating) - len(not_passed)} of {len(gating)} checks on test are within their margins"
    yield f"{section['candidate']} {OUTCOMES[section['outcome']]} ({passed})."
    engine = [section["served"]["text"]] if "served" in section else []
    if section["outcome"] == NOT_AS_MEASURED:
        yield from engine
    for check in sorted(not_passed, key=lambda check: check["outcome"] != "worse"):
        yield f"{check['text'][:1].upper()}{check['text'][1:]}."
    if section["outcome"] != NOT_AS_MEASURED:
        yield from engine
    if "truncated" in section:
        yield section["truncated"]["text"]
    yield f"It is the candidate: {section['reason']}."
    yield _champion_text(section["champion"])


def _champion_text(champion: Mapping[str, Any] | None) -> str:
    if champion is None:
        return (
            "No champion was compared with: `quench promote` evaluates the present one, if there is one, and decides."
        )
    named = f"the champion, version {champion['version']} ({champion['arm']} of run {champion['run']})"
    if champion["same"]:
        return f"It is {named}: nothing to promote."
    note = f" {champion['note']}" if champion["note"] else ""
    return (
        f"Compared with {named} on {champion['rows'] - champion['removed']:,} of {champion['rows']:,} rows of test; "
        f"{champion['removed']:,} that it was trained on are left out.{note}"
    )
