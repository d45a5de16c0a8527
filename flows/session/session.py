"""The steps of one run: hits are taken, the others made, and all of them recorded and shown."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flows.compose import limits
from flows.gate.served import excused
from flows.mlflow_uri import silent
from flows.plan.critical import behind
from flows.plan.history import same_recipe
from flows.plan.lookup import known_inputs, needs
from flows.plan.registered import counted, document_problems
from flows.plan.validate import Validated
from flows.report.build import Report
from flows.results.read import read_run
from flows.run.folder import RunRecord
from flows.run.progress import Display
from flows.tracking.sync import REPORTED, sync_run
from flows.tracking.tracker import Tracker
from recipes.problem import Problem, RecipeError
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, Outcome, Step, lookup, run_step
from tasks.runtime.store.local import Artifact
from tasks.runtime.store.open import open_store

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


class Session:
    """One run: keeps its steps' artifacts, and reports to terminal and MLflow. As it stands, it takes hits alone.

    What makes steps is a subclass: it says how one is submitted and awaited, and where else the run is shown.
    """

    def __init__(
        self, validated: Validated, launcher: Launcher, record: RunRecord, tracker: Tracker, *, log: Log
    ) -> None:
        self.record = record
        self.validated = validated
        self.log = log
        self.display = Display()
        self.tracker = tracker
        nothing = all(step.hit for step in validated.plan)  # to make: then no other run's record is read
        self.took = {} if nothing else same_recipe(record.home, validated.recipe.name)
        urgent = behind(validated.plan, self.took)
        self.store = store = open_store(record.home, stop=launcher.stop, say=self.display.line)
        self.context = Context(
            store=store,
            launcher=launcher,
            leases=Leases(store.home),
            limits=limits(validated.recipe),
            urgency=lambda step: urgent.get(step.key, 0.0),
            on_event=self.on_event,
            on_line=self.on_line,
        )
        self.steps: dict[str, Step] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.futures: dict[str, Any] = {}  # of a task runner, whichever it is

    def do(self, step: Step) -> None:
        """Take a hit at once; submit everything else as a task that waits for the tasks it needs."""
        self.steps[step.key] = step
        inputs = known_inputs(step, self.artifacts)
        if inputs is not None and (artifact := lookup(step, inputs, self.store).artifact):
            self.done(step, Outcome(artifact=artifact, hit=True))
            return
        if step.whole_machine:  # it would hold the gate while others wait: let them finish first
            self.wait()
        self.futures[step.key] = self.submit(step, [self.futures[key] for key in needs(step) if key in self.futures])

    def submit(self, step: Step, before: list[Any]) -> Any:
        """Have one step made after the tasks `before`.

        Raises:
            RecipeError: This session takes hits alone.
        """
        raise Problem(
            what=f"{step.key} is not in the store any more",
            where=str(self.store.home),
            why="it was there when this run was planned, so somebody removed it since",
            next="the same command again: it makes what is missing",
        ).error()

    def wait(self) -> None:
        """Return when every task that was submitted has ended."""

    def stop(self) -> None:
        """End what is left of the tasks: the launcher ended their children already."""

    def make(self, key: str) -> str:
        """Body of a task: run_step, then record it; returns the committed folder."""
        step = self.steps[key]
        inputs = known_inputs(step, self.artifacts)
        if inputs is None:  # unreachable while tasks wait for what they need
            raise RuntimeError(f"{key}: an input was not made")
        self.display.started(key)
        try:
            made = run_step(step, inputs, self.context)
        except StepFailed as error:
            self.failed(step, error)
            raise
        self.done(step, made)
        return str(made.artifact.folder)

    def failed(self, step: Step, error: StepFailed, *, node: dict[str, str] | None = None) -> None:
        """Record and show a step that failed."""
        self.record.add(step, "failed", problem=error.problem.as_dict(), log=error.log, node=node)
        again = f"\n      again: quench debug {step.key} --run {self.record.id}" if error.log.startswith("/") else ""
        said = f"fail  {step.key:<36} {error.problem.what}\n      log: {error.log}{again}"
        self.display.ended(step.key, said, style="red")

    def done(self, step: Step, made: Outcome, *, node: dict[str, str] | None = None) -> None:
        """Take a finished step in: record, terminal, MLflow."""
        self.artifacts[step.key] = made.artifact
        folder = made.artifact.folder
        path = str(folder.relative_to(self.store.home)) if folder else None
        status = "hit" if made.hit else "made"
        seconds = made.artifact.manifest["seconds"]
        record = self.record.add(step, status, path=path, seconds=0.0 if made.hit else seconds, node=node)
        took = "" if made.hit else f"{seconds:6.1f} s"
        took += f"  on {node['host']} ({node['address']})" if node else ""
        style, spent = ("dim", None) if made.hit else (None, seconds)
        self.display.ended(step.key, f"{status:<5} {step.key:<36} {took}", style=style, seconds=spent)
        self.tracker.step(vars(record))
        if step.stage == "rehearse" and (documents := made.artifact.manifest["result"].get("documents")):
            self.count_documents(documents)

    def count_documents(self, documents: Mapping[str, Mapping[str, int]]) -> None:
        """Register how many documents lm-eval tasks have, and say where they are too few for the gate.

        Args:
            documents: By metric and task, as rehearse counted them.
        """
        told = counted(self.validated.registered, documents)
        self.record.register(told)
        said = {warning.what for warning in self.validated.warnings}
        for problem in document_problems(self.validated.recipe, told):
            if problem.what not in said:
                self.display.line(f"warning: {problem}", style="yellow")
                self.log_warning(str(problem))

    def log_warning(self, text: str) -> None:
        """Write a warning into the run's log."""
        self.log.warning("%s", text)

    def collect(self) -> None:
        """Wait for every task; record what never ran."""
        self.wait()
        for key, future in self.futures.items():
            record = self.record.records.get(key)
            if future.state.name == "NotReady":
                self.record.add(self.steps[key], "skipped", problem=self.skipped(key))
            elif record is None or (record.status in ("hit", "made") and not future.state.is_completed()):
                future.result()  # not a step's failure but ours: let it be seen

    def complete(self) -> bool:
        """All steps have their artifact and all their scores; but for arms that the engine does not serve.

        What no engine serves fails the run only where it is the candidate: the other arms were for comparison.
        """
        lost = {key for key, record in self.record.records.items() if record.status not in ("hit", "made")}
        if any(self.steps[key].stage == "serve" for key in lost):
            lost -= excused(read_run(self.record.folder, self.store.home))
        return not lost and not self.unscored

    def end(self) -> None:
        """Close the run in MLflow; where MLflow was away and is back, write the run anew; say what is missing."""
        self.tracker.end(self.record.status)
        if self.tracker.trouble and self.record.status in REPORTED and not silent(self.tracker.uri):
            try:
                self.tracker = sync_run(self.store.home, self.record.folder, say=self.display.line) or self.tracker
            except RecipeError as error:
                self.tracker.trouble += [problem.what for problem in error.problems]
        for line in dict.fromkeys(self.tracker.trouble):
            self.display.line(f"MLflow is behind (`quench track sync` sends it): {line}", style="yellow")

    @property
    def unscored(self) -> list[str]:
        """`evaluate/ARM (METRIC)` where a scorer failed: the artifact says why, and has the arm's other scores."""
        metrics = {key: artifact.manifest["result"].get("problems", ()) for key, artifact in self.artifacts.items()}
        return [f"{key} ({', '.join(failed)})" for key, failed in metrics.items() if failed]

    def skipped(self, key: str) -> dict[str, str]:
        """Why a step was not run."""
        step = self.steps[key]
        missing = [key for key in needs(step) if key not in self.artifacts]
        return {
            "what": "not run",
            "where": key,
            "why": f"{', '.join(missing) or 'an input'} was not made",
            "next": "mend that and run again",
        }

    def on_event(self, step: Step, event: dict[str, Any]) -> None:
        """A child's event: terminal bar, MLflow curve."""
        self.display.event(step.key, event)
        self.tracker.live(step.key, event)

    def on_line(self, step: Step, line: str) -> None:
        """A line of a child's log."""

    def show_plan(self, markdown: str) -> None:
        """Show hit or make of every step, before the run."""

    def show_report(self, report: Report) -> None:
        """Show the report elsewhere than in its folder."""
