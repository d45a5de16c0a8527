"""Body of a run: make what was validated, record it, report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from flows.compose import compose
from flows.plan.registered import registered_tag
from flows.plan.validate import Validated
from flows.report.build import render
from flows.report.inert import inert, one_line
from flows.report.tables import escaped
from flows.run.folder import RunRecord, new_id
from flows.session.session import Session
from flows.tracking.tracker import Tracker
from tasks.runtime.process.launch import Launcher
from tasks.runtime.store.local import find_home, write_json

NO_LOG = logging.getLogger("quench.run")  # the terminal shows what it would say
NO_LOG.addHandler(logging.NullHandler())
NO_LOG.propagate = False


class RunFailed(Exception):
    """At least one step failed; the report says which and why.

    Attributes:
        failed: Keys of the steps, and arms without scores.
        folder: The run's own: runs/latest may be another one's by the time that somebody looks.
    """

    def __init__(self, failed: Sequence[str], folder: str) -> None:
        super().__init__(failed, folder)
        self.failed, self.folder = failed, folder

    def __str__(self) -> str:
        return f"{', '.join(self.failed)} failed; see {Path(self.folder) / 'report.md'}"


def run_hits(validated: Validated, *, only: Sequence[str]) -> str:
    """A run of which the store has every step: record, MLflow and report are as of any other, and no Prefect is needed.

    Args:
        validated: The recipe, pinned and planned.
        only: Arms that are wanted.

    Returns:
        The run's folder.

    Raises:
        RecipeError: MLflow cannot be written; a step is not in the store any more.
        RunFailed: A scorer had failed when its step was made.
    """
    home, name = find_home(), validated.recipe.name
    run = new_id(name)
    tracker = Tracker(home, experiment=name, run=run)
    record = RunRecord(home, validated.loaded, id=run)
    with Launcher() as launcher:
        return to_its_end(Session(validated, launcher, record, tracker, log=NO_LOG), only=only)


def to_its_end(session: Session, *, only: Sequence[str]) -> str:
    """Work, and whatever happens, end children, record and MLflow's run; returns the run's folder.

    Raises:
        RunFailed: A step failed; everything that finished is in the store and in the report.
    """
    record = session.record
    try:
        with session.display:
            _work(session, only=only)
    finally:
        session.context.launcher.end_all()  # before anything that may have to wait
        session.stop()
        if record.status == "running":
            record.finish("stopped")
        session.end()
    if record.status == "failed":
        failed = [step.key for step in record.records.values() if step.status == "failed"]
        raise RunFailed([*failed, *session.unscored], str(record.folder))
    return str(record.folder)


def _work(session: Session, *, only: Sequence[str]) -> None:
    """Plan, make, report."""
    record, validated, log = session.record, session.validated, session.log
    record.pinned(validated.pins, only=only)
    write_json(record.folder / "preflight.json", validated.preflight)
    (record.folder / "plan.txt").write_text("\n".join(str(line) for line in validated.plan) + "\n", encoding="utf-8")
    source = {"mlflow.source.name": str(validated.loaded.path), **registered_tag(validated.registered)}
    session.tracker.start(validated.recipe.model_dump(mode="json"), tags=source)
    for note in session.tracker.notes:
        session.display.line(note)
        log.info("%s", note)
    hits = sum(step.hit for step in validated.plan)
    log.info("run %s: %d of %d steps are in the store", record.id, hits, len(validated.plan))
    record.register(validated.registered)
    for sentence in () if only else validated.registered["text"]:
        session.display.line(f"registered: {sentence}")
        log.info("registered: %s", sentence)
    for warning in validated.warnings:
        log.warning("%s", warning)
    session.show_plan(_plan_markdown(validated))
    to_make = [step.key for step in validated.plan if not step.hit]
    session.display.expect(to_make, session.took)
    matrix = compose(validated.recipe, validated.pins, session.do, only=only)
    record.composed(matrix)
    session.collect()
    record.composed(matrix)
    record.finish("completed" if session.complete() else "failed")
    report = render(record.folder, session.store.home)
    session.show_report(report)
    record.publish()
    session.tracker.report(report.json, record.folder, pictures=report.pictures)
    for sentence in report.json["verdict"]:
        log.info(sentence)
    log.info("report: %s", record.folder / "report.html")


def _plan_markdown(validated: Validated) -> str:
    rows = [
        f"| {'hit' if step.hit else 'make'} | `{step.key}` | {escaped(one_line(step.why))} |" for step in validated.plan
    ]
    return inert("\n".join(["| | step | why |", "| --- | --- | --- |", *rows]))
