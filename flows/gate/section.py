"""The report's `gate`: candidate, every check on test, outcome, and all of it in words.

Pure: champion and best version take part where `quench promote` has evaluated them on this run's rows and left
promotion.json behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.gate.candidate import candidate, margins_of
from flows.gate.checks import (
    BASE,
    BEST,
    Check,
    Outcome,
    PlannedCheck,
    Scores,
    better_than_base,
    judge,
    outcome_of,
    planned_checks,
    restricted,
)
from flows.gate.looks import Looks, level_text, ordinal
from flows.gate.served import NOT_AS_MEASURED, of_engine, together
from flows.gate.truncated import truncated_of
from flows.reach import PROMOTION
from flows.results.cells import ArmEvidence
from flows.results.paired import Draw
from flows.results.read import Run, RunArm
from flows.results.rows import read_scores
from flows.results.stats import LEVEL
from recipes.arms import CHAMPION
from recipes.schema import Gate

OUTCOMES = {
    "pass": "passes the gate",
    "worse": "does not pass the gate: it is worse",
    "undecided": "does not pass the gate: this much data cannot tell",
    NOT_AS_MEASURED: "does not pass the gate: what the engine serves is not what was measured",
}
SPENT_OUT = "does not pass the gate: these rows of test have judged as many candidates as they may"


def gate_of(
    run: Run, evidence: Mapping[str, ArmEvidence], draws: Draw, *, served: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything about promotion that report.json says; `served` is what it says of the engine."""
    margins, chosen, record = margins_of(run), candidate(run, draws), _record(run)
    champion, looks = record.get("champion"), record.get("looks") and Looks.of(record["looks"])
    arm = chosen.arm
    same = champion is not None and arm is not None and _digest(run, arm) == champion["digest"]
    planned = _planned(arm, evidence, margins, {} if same else record, run) if arm else ()
    checks = judge(list(planned), draws, level=looks.level if looks else LEVEL)
    engine = of_engine(arm, run, served) if arm else None
    cut = truncated_of(evidence[arm.slug].scores) if arm else None
    compared = any(check.against == CHAMPION for check in checks)
    section = {
        "candidate": arm.slug if arm else None,
        "reason": chosen.reason,
        "left_out": dict(chosen.left_out),
        "outcome": _outcome(checks, looks, engine) if arm else "none",
        "margins": margins.model_dump(),
        "tests": [check.as_dict() for check in checks if check.domain is None],
        "domains": [check.as_dict() for check in checks if check.domain is not None],
        **({"served": engine} if engine else {}),
        **({"truncated": cut} if cut else {}),
        "champion": champion and {**_shown(champion), "same": same, "compared": compared},
        "best": _shown(record["best"]) if record.get("best") else None,
        "looks": looks and looks.as_dict(),
        "chain": record.get("chain"),
    }
    return {**section, "text": list(sentences(section))}


def _planned(
    arm: RunArm, evidence: Mapping[str, ArmEvidence], margins: Gate, record: Mapping[str, Any], run: Run
) -> Iterator[PlannedCheck]:
    """The candidate against what it was made from, the base, what it would replace, and the best before that."""
    own = evidence[arm.slug].scores
    if arm.scheme is not None:  # a merged model is not compared with itself
        merged = f"merged-{arm.merge_base}"
        yield from planned_checks(own, evidence[merged].scores if merged in evidence else {}, merged, margins)
    if margins.better_than_base:
        yield better_than_base(own, evidence[BASE].scores if BASE in evidence else {})
    if champion := record.get("champion"):
        yield from planned_checks(*_both(own, champion, run), CHAMPION, margins)
    if best := record.get("best"):  # one margin for the whole chain; slices and general text stay the champion's
        every = planned_checks(*_both(own, best, run), BEST, margins)
        yield from (check for check in every if check.domain is None and check.metric != "general_loss")


def _both(own: Scores, other: Mapping[str, Any], run: Run) -> tuple[Scores, Scores]:
    """Scores of the candidate and of another version on the rows that the other one was not trained on."""
    files, removed = run.home / other["evaluate"] / "files", frozenset(other["removed"])
    theirs = read_scores(files) if files.is_dir() else {}  # without its scores nothing is decided
    return restricted(own, removed), restricted(theirs, removed)


def _outcome(checks: Sequence[Check], looks: Looks | None, engine: Mapping[str, Any] | None) -> Outcome:
    """Of checks and engine; where these rows have judged as many as they may, nothing is decided, not even worse."""
    return "undecided" if looks and looks.spent_out else together(outcome_of(checks), engine)


def _record(run: Run) -> dict[str, Any]:
    """promotion.json; empty where nothing was decided. One of an older Quench has no looks: as it was decided then."""
    path = run.folder / PROMOTION
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _digest(run: Run, arm: RunArm) -> str | None:
    step = run.step(arm.model)
    return step.manifest["digest"] if step and step.manifest else None


def _shown(version: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: version[name] for name in ("model", "version", "run", "arm", "digest", "evaluate", "rows", "note")}
    return {**named, "removed": len(version["removed"])}


def sentences(section: Mapping[str, Any]) -> Iterator[str]:
    """All of `gate` in words: the verdict, then the checks that did not pass, the worse ones first."""
    if section["candidate"] is None:
        yield f"Nothing can be promoted: {section['reason']}."
        yield from (f"{slug}: {why.rstrip('.')}." for slug, why in section["left_out"].items())
        return
    gating = [check for check in (*section["tests"], *section["domains"]) if check["gates"]]
    not_passed = [check for check in gating if check["outcome"] != "pass"]
    passed = f"{len(gating) - len(not_passed)} of {len(gating)} checks on test are within their margins"
    looks = section.get("looks")
    spent_out = bool(looks) and Looks.of(looks).spent_out
    yield f"{section['candidate']} {SPENT_OUT if spent_out else OUTCOMES[section['outcome']]} ({passed})."
    if looks and spent_out:
        yield looks["text"]
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
    if looks and not spent_out:
        yield looks["text"]
    if looks and section["champion"] is None:
        yield "There was no champion to compare with."
    else:
        yield _champion_text(section["champion"])
    yield from chain_sentences(section)
    if looks is None and section["champion"] is None and "margins" in section:
        yield _first_look(section["margins"]["looks"])


def _first_look(limit: int) -> str:
    later = (
        f", further ones up to the {ordinal(limit)} at {level_text(Looks(number=2, limit=limit).level)}"
        if limit > 1
        else ""
    )
    return (
        f"These figures are those of a first candidate on these rows, decided at {level_text(LEVEL)}; `quench promote` "
        f"counts the candidates{later}."
    )


def _champion_text(champion: Mapping[str, Any] | None) -> str:
    if champion is None:
        return (
            "No champion was compared with: `quench promote` evaluates the present one, if there is one, and decides."
        )
    named = f"the champion, {_named(champion)}"
    if champion["same"]:
        return f"It is {named}: nothing to promote."
    return f"Compared with {named} {_on_rows(champion)}"


def _named(version: Mapping[str, Any]) -> str:
    return f"version {version['version']} ({version['arm']} of run {version['run']})"


def _on_rows(version: Mapping[str, Any]) -> str:
    note = f" {version['note']}" if version["note"] else ""
    return (
        f"on {version['rows'] - version['removed']:,} of {version['rows']:,} rows of test; "
        f"{version['removed']:,} that it was trained on are left out.{note}"
    )


def chain_sentences(section: Mapping[str, Any]) -> Iterator[str]:
    """What the candidate follows: the best version so far, and what could not be compared with."""
    chain = section.get("chain")
    if chain is None:
        return
    if best := section.get("best"):
        yield f"Compared with the best version so far, {_named(best)}, too, {_on_rows(best)}"
        yield "What was lost since then counts against the same margins."
    elif len(chain["versions"]) > 1:
        yield f"The champion is the best of the {len(chain['versions'])} versions so far."
    elif chain["elsewhere"] and not chain["versions"] and not chain["left_out"]:
        yield "This test shares no row with any that a promoted version was judged on: a new chain begins."
    if chain["left_out"]:
        named = (f"version {line['version']}: {line['reason']}" for line in chain["left_out"])
        yield f"Left out of the chain: {len(chain['left_out'])} ({'; '.join(named)})."
    if chain["unread"]:
        lines = "1 line" if chain["unread"] == 1 else f"{chain['unread']} lines"
        yield f"Left out: {lines} of promotions.jsonl of another version of Quench, which this one cannot read."
