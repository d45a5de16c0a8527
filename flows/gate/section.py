"""The report's `gate`: candidate, every check on test, outcome, and all of it in words.

Pure: a champion takes part where `quench promote` has evaluated it on this run's rows and left promotion.json behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.gate.candidate import Candidate, candidate, margins
from flows.gate.checks import BASE, Asked, Draw, asked, better_than_base, judge, outcome_of, restricted
from flows.results.cells import ArmEvidence
from flows.results.read import Run, read_scores
from recipes.arms import CHAMPION
from recipes.schema import Gate

PROMOTION = "promotion.json"  # in the run's folder; flows/promotion/promote.py writes it
SAYS = {
    "pass": "passes the gate",
    "worse": "does not pass the gate: it is worse",
    "undecided": "does not pass the gate: this much data cannot tell",
}


def gate_of(run: Run, evidence: Mapping[str, ArmEvidence], draws: Draw) -> dict[str, Any]:
    """Everything about promotion that report.json says."""
    gate, found, champion = margins(run), candidate(run, draws), _champion(run)
    same = champion is not None and found.arm is not None and _digest(run, found) == champion["digest"]
    checks = judge(list(_asked(found, evidence, gate, None if same else champion, run)), draws)
    outcome = outcome_of(checks) if found.arm else "none"
    told = [one.as_dict() for one in checks]
    made = {
        "candidate": found.arm.slug if found.arm else None,
        "reason": found.reason,
        "left_out": dict(found.left_out),
        "outcome": outcome,
        "margins": gate.model_dump(),
        "tests": [one for one in told if one["domain"] is None],
        "domains": [one for one in told if one["domain"] is not None],
        "champion": champion and _shown(champion, checked=any(one.against == CHAMPION for one in checks), same=same),
    }
    return {**made, "text": list(sentences(made))}


def _asked(
    found: Candidate, evidence: Mapping[str, ArmEvidence], gate: Gate, champion: Mapping[str, Any] | None, run: Run
) -> Iterator[Asked]:
    if found.arm is None:
        return
    own = evidence[found.arm.slug].scores
    if found.arm.scheme is not None:  # a merged model is not compared with itself
        merged = f"merged-{found.arm.merge_base}"
        yield from asked(own, evidence[merged].scores if merged in evidence else {}, merged, gate)
    if gate.better_than_base:
        yield better_than_base(own, evidence[BASE].scores if BASE in evidence else {})
    if champion is not None:
        files = run.home / champion["evaluate"] / "files"
        removed = frozenset(champion["removed"])
        theirs = read_scores(files) if files.is_dir() else {}  # without its scores nothing is decided
        yield from asked(restricted(own, removed), restricted(theirs, removed), CHAMPION, gate)


def _champion(run: Run) -> dict[str, Any] | None:
    path = run.folder / PROMOTION
    return json.loads(path.read_text(encoding="utf-8"))["champion"] if path.exists() else None


def _digest(run: Run, found: Candidate) -> str | None:
    step = run.step(found.arm.model) if found.arm else None
    return step.manifest["digest"] if step and step.manifest else None


def _shown(champion: Mapping[str, Any], *, checked: bool, same: bool) -> dict[str, Any]:
    named = {name: champion[name] for name in ("model", "version", "run", "arm", "digest", "evaluate", "rows", "note")}
    return {**named, "removed": len(champion["removed"]), "same": same, "compared": checked}


def sentences(made: Mapping[str, Any]) -> Iterator[str]:
    """All of `gate` in words: the verdict first, then the checks that did not pass, those that are worse before."""
    if made["candidate"] is None:
        yield f"Nothing can be promoted: {made['reason']}."
        yield from (f"{slug}: {why.rstrip('.')}." for slug, why in made["left_out"].items())
        return
    gating = [one for one in (*made["tests"], *made["domains"]) if one["gates"]]
    open_ = [one for one in gating if one["outcome"] != "pass"]
    passed = f"{len(gating) - len(open_)} of {len(gating)} checks on test are within their margins"
    yield f"{made['candidate']} {SAYS[made['outcome']]} ({passed})."
    yield from (f"{_capital(one['text'])}." for one in _worst_first(open_))
    yield f"It is the candidate: {made['reason']}."
    yield _beside(made["champion"])


def _worst_first(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(checks, key=lambda one: one["outcome"] != "worse")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _beside(champion: Mapping[str, Any] | None) -> str:
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
