"""Promotion: the candidate of a run through the gate, onto the record, into the registry; and back again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flows.gate.candidate import candidate, margins_of
from flows.gate.looks import looks_of
from flows.promotion.chain import Chain, chain_of
from flows.promotion.champion import TRAIN_ROWS, ChampionScores, evaluated, stale, trained_on
from flows.promotion.evidence import SCORES, judged, keep_rows, keep_scores, record_folder, test_rows
from flows.promotion.journal import MOVES, Journal, Promotion, champion, locked, now, version_of, versions
from flows.promotion.registry import sync
from flows.reach import PROMOTION
from flows.report.build import Report, render
from flows.report.model_card import card_of
from flows.results.cells import Draws
from flows.results.read import Run, RunArm, read_run, recipe_of
from recipes.problem import Problem, RecipeError
from tasks.runtime.fingerprint import file_digest, fingerprint
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.store.local import Store, write_json

Say = Callable[[str], None]
CARD = "card.md"


class Decision(NamedTuple):
    """What came of a promotion or a rollback.

    Attributes:
        event: `promoted`, `blocked`, `nothing` (it is champion already), `none` (there is no candidate), `rolled back`.
        promotion: The line that was written; None where none was.
        gate: The report's `gate`; empty after a rollback.
        trouble: What the registry refused. The next promotion puts it right.
    """

    event: Literal["promoted", "blocked", "nothing", "none", "rolled back"]
    promotion: Promotion | None
    gate: Mapping[str, Any]
    trouble: list[str]


def promote(run_folder: Path, home: Path, *, say: Say) -> Decision:
    """Decide about a run's candidate, under the lock.

    Raises:
        RecipeError: The candidate's or the champion's files are damaged or gone, or the two cannot be compared.
        StepFailed: The champion does not load or compute.
    """
    with locked(home):
        run = read_run(run_folder, home)
        arm = candidate(run, Draws()).arm
        if arm is None:
            return Decision("none", None, _reported(run, {"champion": None}).json["gate"], [])
        journal = Journal(home, model_name(run_folder))
        lines = journal.lines()
        present = champion(lines)
        drafted = _drafted(run, arm, lines, present, highest=journal.highest())
        files = _scored(run, arm)
        rows = test_rows(files)
        looks = looks_of(drafted.digest, rows, judged(home, lines), limit=margins_of(run).looks)
        record: dict[str, Any] = {"champion": None, "looks": looks.as_dict()}
        if present is not None and present.digest == drafted.digest:
            record["champion"] = _compared(present, ChampionScores(evaluate="", rows=0, removed=[], note=None))
            return Decision("nothing", None, _reported(run, record).json["gate"], sync(home, journal.model, lines))
        say(f"reading every byte of {drafted.path}")
        if problem := stale(Store(home), drafted):
            raise _made_again(problem, arm).error()
        if present is not None:
            say(
                f"evaluating the champion, version {present.version} ({present.arm} of run {present.run}), on this test"
            )
            record["champion"] = _compared(present, evaluated(present, run, arm, home))
        chain = chain_of(home, lines, digest=drafted.digest, files=files, scoring=drafted.scoring)
        chain, record["best"] = _best(replace(chain, unread=journal.unread()), present, run, arm, say=say)
        record["chain"] = chain.as_dict(_number(present))
        report = _reported(run, record)
        gate = report.json["gate"]
        promotion = replace(
            drafted,
            event="promoted" if gate["outcome"] == "pass" else "blocked",
            outcome=gate["outcome"],
            checks=[*gate["tests"], *gate["domains"]],
            served=gate["served"]["text"] if "served" in gate else None,
            test=keep_rows(home, drafted.model, rows),
            look=looks.number,
        )
        _keep(promotion, run, arm, report, home)
        journal.append(promotion)
        return Decision(promotion.event, promotion, gate, sync(home, journal.model, journal.lines()))


def _best(
    chain: Chain, present: Promotion | None, run: Run, arm: RunArm, *, say: Say
) -> tuple[Chain, dict[str, Any] | None]:
    """The best version of the chain on this test, and the chain without those that could not be evaluated.

    None where it is the champion, which is compared with anyway, or where there is no version to compare with.
    """
    while (best := chain.best) is not None and best.line.version != _number(present):
        line = best.line
        say(f"evaluating the best version so far, version {line.version} ({line.arm} of run {line.run}), on this test")
        try:
            return chain, _compared(line, evaluated(line, run, arm, run.home))
        except (RecipeError, StepFailed) as error:
            why = str(error).splitlines()[0]
            say(f"version {line.version} is left out: {why}")
            chain = chain.without(line.version, f"it could not be evaluated: {why.rstrip('.')}")
    return chain, None


def roll_back(home: Path, model: str, version: int, *, say: Say) -> Decision:
    """Make a version champion again that was one before.

    Raises:
        RecipeError: No such version, it never passed the gate, it is champion, its files are damaged or gone.
    """
    with locked(home):
        journal = Journal(home, model)
        lines = journal.lines()
        present, known = champion(lines), versions(lines)
        wanted = known.get(version)
        if problem := _not_back(model, version, wanted, known, present):
            raise problem.error()
        assert wanted is not None
        say(f"reading every byte of {wanted.path}")
        if problem := stale(Store(home), wanted):
            raise problem.error()
        promotion = replace(
            wanted,
            at=now(),
            event="rolled back",
            outcome="none",
            champion=_number(present),
            checks=[],
            served=None,
            test=None,
            look=None,
        )
        journal.append(promotion)
        return Decision("rolled back", promotion, {}, sync(home, model, journal.lines()))


def model_name(run_folder: Path) -> str:
    """Name in the registry of what a run makes.

    Raises:
        RecipeError: Its recipe is one of another version of Quench.
    """
    return recipe_of(run_folder).model_name


def _not_back(
    model: str, version: int, wanted: Promotion | None, known: Mapping[int, Promotion], present: Promotion | None
) -> Problem | None:
    able = [str(number) for number, line in known.items() if line.event in MOVES and number != _number(present)]
    remedy = f"Name one of: {', '.join(able)}." if able else "No other version was ever champion."
    if wanted is None:
        what, why = f"{model} has no version {version}.", f"It has {', '.join(map(str, known)) or 'none'}."
    elif wanted.event not in MOVES:
        what, why = f"Version {version} of {model} never passed the gate.", f"It was judged {wanted.outcome}."
    elif version == _number(present):
        what, why = f"Version {version} of {model} is the champion.", "There is nothing to roll back."
    else:
        return None
    return Problem(what=what, where="quench promote --to", why=why, next=remedy)


def _number(present: Promotion | None) -> int | None:
    return present.version if present else None


def _drafted(
    run: Run, arm: RunArm, lines: Sequence[Promotion], present: Promotion | None, *, highest: int
) -> Promotion:
    """The decision without its outcome; `highest` is the highest version on record."""
    step = run.step(arm.model)
    assert step is not None and step.manifest is not None and step.path is not None  # a candidate was made
    return Promotion(
        at=now(),
        model=model_name(run.folder),
        version=version_of(lines, step.manifest["digest"], highest=highest),
        event="blocked",
        outcome="none",
        run=run.raw["id"],
        arm=arm.slug,
        kind=arm.kind,
        path=step.path,
        digest=step.manifest["digest"],
        recipe=file_digest(run.folder / "recipe.resolved.json"),
        dataset=trained_on(run.home, Path(step.path))["dataset"],
        champion=_number(present),
        scoring=fingerprint({"scorers": (run.recipe.get("evaluate") or {}).get("scorers")}),
    )


def _scored(run: Run, arm: RunArm) -> Path:
    """Files of the candidate's evaluation."""
    step = run.step(arm.evaluate)
    assert step is not None and step.files is not None  # a candidate was evaluated
    return step.files


def _made_again(problem: Problem, arm: RunArm) -> Problem:
    return Problem(
        what=f"{arm.slug} is damaged.",
        where=problem.where,
        why=f"{problem.why} It is not what was evaluated.",
        next="quench run makes it again.",
    )


def _compared(version: Promotion, scores: ChampionScores) -> dict[str, Any]:
    """What promotion.json says about a version that was compared with: the champion, or the best before it."""
    return {name: getattr(version, name) for name in ("model", "version", "run", "arm", "digest")} | asdict(scores)


def _reported(run: Run, record: dict[str, Any]) -> Report:
    write_json(run.folder / PROMOTION, record)
    return render(run.folder, run.home)


def _keep(promotion: Promotion, run: Run, arm: RunArm, report: Report, home: Path) -> None:
    """Write train rows, scores and card of a version, which outlive its data set and its run."""
    folder = record_folder(home, promotion)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAIN_ROWS).write_text(json.dumps(trained_on(home, Path(promotion.path))) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card_of(run, arm, report.json), encoding="utf-8")
    if promotion.event == "promoted" or not (folder / SCORES).exists():
        keep_scores(home, promotion, _scored(run, arm))


def sentences(decision: Decision) -> Iterator[str]:
    """The decision in words."""
    line = decision.promotion
    if decision.event == "rolled back" and line:
        yield f"Version {line.version} of {line.model} ({line.arm} of run {line.run}) is champion again."
        return
    if decision.event == "promoted" and line:
        yield f"Promoted: version {line.version} of {line.model}, {line.arm} of run {line.run}."
    elif decision.event == "blocked" and line:
        stays = f"version {line.champion} stays champion" if line.champion else "there is no champion yet"
        yield f"Not promoted ({line.outcome}); {stays}."
    elif decision.event == "nothing":
        yield "Nothing to promote: the candidate is the champion."
        return
    yield from (f"  {text}" for text in decision.gate["text"])
