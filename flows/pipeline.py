"""The finetune-and-quantize flow, and the one Prefect task, which wraps run_step.

Resume is re-running: what is in the store is a hit. A failed arm fails its own cells of the report, not the
matrix; the exit code still says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events.worker import EventsWorker
from prefect.futures import wait
from prefect.runtime import flow_run
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner

from flows.compose import compose, limits
from flows.gate.served import excused
from flows.mlflow_uri import silent
from flows.plan.lookup import Planned, known_inputs
from flows.plan.registered import counted, document_problems, registered_tag
from flows.plan.validate import Validated, validate
from flows.report.build import render
from flows.report.inert import inert, one_line
from flows.report.tables import escaped
from flows.results.read import read_run
from flows.run.credentials import settle
from flows.run.folder import RunRecord, new_id
from flows.run.prefect_pages import PrefectPages
from flows.run.progress import Display
from flows.tracking.sync import REPORTED, sync_run
from flows.tracking.tracker import Tracker
from recipes.problem import Problem, RecipeError
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, Outcome, Step, lookup, run_step
from tasks.runtime.store.local import Artifact, find_home, write_json
from tasks.runtime.store.open import open_store

WAITING_TASKS = 32  # a task only waits for its child: leases decide what runs at once
CANCEL_POLL_S = 2.0

# What most children of a run import: torch, transformers, and our own. bitsandbytes and TRL are needed by few.
WARM = ("tasks.jobs.evaluate", "tasks.jobs.quantize", "tasks.jobs.measure", "tasks.jobs.reference")


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


class Session:
    """One run of the flow: submits steps, keeps their artifacts, and reports to terminal, Prefect and MLflow."""

    def __init__(self, validated: Validated, launcher: Launcher, record: RunRecord, tracker: Tracker) -> None:
        self.record = record
        self.validated = validated
        self.display = Display()
        self.tracker = tracker
        self.store = store = open_store(record.home, stop=launcher.stop, say=self.display.line)
        self.context = Context(
            store=store,
            launcher=launcher,
            leases=Leases(store.home),
            limits=limits(validated.recipe),
            on_event=self.on_event,
            on_line=self.on_line,
        )
        self.steps: dict[str, Step] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.futures: dict[str, Any] = {}  # of Prefect's task runner, whichever it is
        self.pages = PrefectPages()

        @task(task_run_name="{key}", cache_policy=NO_CACHE, persist_result=False)
        def make(key: str) -> str:
            """Make one step; returns the committed folder."""
            return self.make(key)

        self.task = make

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
        """Hand one step to Prefect, which starts it after the tasks `before`."""
        return self.task.submit(step.key, wait_for=before)  # pyright: ignore[reportCallIssue]

    def wait(self) -> None:
        """Return when every task that was submitted has ended."""
        wait(list(self.futures.values()))

    def stop(self) -> None:
        """End what is left of the tasks: the launcher ended their children already."""

    def make(self, key: str) -> str:
        """Body of the task: run_step, then record it."""
        step = self.steps[key]
        inputs = known_inputs(step, self.artifacts)
        if inputs is None:  # unreachable while wait_for holds
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
        self.display.ended(step.key, f"{status:<5} {step.key:<36} {took}", style="dim" if made.hit else None)
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
                if TaskRunContext.get() or FlowRunContext.get():
                    get_run_logger().warning("%s", problem)

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
        if url := self.tracker.compare_url:
            self.pages.link(url)
        for line in dict.fromkeys(self.tracker.trouble):
            self.display.line(f"MLflow is behind (`quench track sync` sends it): {line}", style="yellow")
        for line in dict.fromkeys(self.pages.trouble):
            self.display.line(f"Prefect does not show {line}", style="yellow")

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
        """A child's event: terminal bar, MLflow curve, Prefect progress artifact."""
        self.display.event(step.key, event)
        self.tracker.live(step.key, event)
        if event["kind"] == "progress" and TaskRunContext.get():
            self.pages.progress(step.key, 100.0 * event["done"] / max(event["total"], 1))

    def on_line(self, step: Step, line: str) -> None:
        """A line of a child's log: into the Prefect run's log."""
        if TaskRunContext.get():
            get_run_logger().info("%s | %s", step.key, line)


def needs(step: Step) -> list[str]:
    """Keys of the steps that have to be made before this one."""
    return [source.key for source in (*step.inputs.values(), *step.after) if isinstance(source, Step)]


def session_class() -> type[Session]:
    """The session that the flow's task runner asks for: one on Ray has its own."""
    context = FlowRunContext.get()
    return getattr(context and context.task_runner, "session", Session)


@flow(  # pyright: ignore[reportCallIssue]
    name="finetune-and-quantize",
    flow_run_name="{recipe}",
    task_runner=ThreadPoolTaskRunner(max_workers=WAITING_TASKS),  # pyright: ignore[reportArgumentType]
    persist_result=False,
)
def finetune_and_quantize(recipe: str, sets: list[str] | None = None, only: list[str] | None = None) -> str:
    """One recipe in; evaluated 4-bit models and a report out.

    Args:
        recipe: Path of the recipe file, absolute or seen from the folder where the command is typed.
        sets: Overrides of single fields, as ["train.rank=32"].
        only: Arms that are wanted, `external` for every external model; only what they need is made.

    Returns:
        The run's folder.

    Raises:
        RecipeError: Bad input, all of it at once, before anything is spent.
        RunFailed: A step failed; everything that finished is in the store and in the report.
    """
    settle(get_run_logger())
    with refusals_logged():
        validated = validate(Path(recipe), sets=sets or [], home=find_home(), only=only or [])
    return run_validated(validated, only=only or [])


def run_validated(validated: Validated, *, only: Sequence[str], because: Sequence[str] = ()) -> str:
    """Body of a flow: make what was validated, tell Prefect and MLflow, report; returns the run's folder.

    Args:
        validated: The recipe, pinned and planned.
        only: Arms that are wanted.
        because: Why it runs, for the report; empty where a person started it.

    Raises:
        RunFailed: A step failed; everything that finished is in the store and in the report.
    """
    home, run = find_home(), new_id(validated.recipe.name)
    with refusals_logged():
        tracker = Tracker(home, experiment=validated.recipe.name, run=run)
    record = RunRecord(home, validated.loaded, id=run, flow_run=flow_run.id, because=because)
    with Launcher(warm=WARM) as launcher, watched(launcher):
        session = session_class()(validated, launcher, record, tracker)
        try:
            with session.display:
                _work(session, validated, only=only)
        finally:
            launcher.end_all()  # before anything that may have to wait
            session.stop()
            if record.status == "running":
                record.finish("stopped")
            session.end()
    flush_log()
    if record.status == "failed":
        failed = [step.key for step in record.records.values() if step.status == "failed"]
        raise RunFailed([*failed, *session.unscored], str(record.folder))
    return str(record.folder)


@contextlib.contextmanager
def refusals_logged() -> Generator[None]:
    """Log what is wrong with the input before the run's state is Failed: then `--watch` shows it."""
    try:
        yield
    except RecipeError as error:
        for problem in error.problems:
            get_run_logger().error("%s", problem)
        flush_log()
        raise


@contextlib.contextmanager
def watched(launcher: Launcher) -> Generator[None]:
    """Obey Prefect's cancel while the body runs: end the children, mark the run Cancelled, then end as on SIGTERM.

    A runner or worker does the last part too, but nobody watches a flow that `quench run` started. Prefect's engine has
    the last word on the state: it says Crashed.
    """
    run = FlowRunContext.get()
    if run is None or run.flow_run is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_obey_cancel, args=(run.flow_run.id, launcher, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _obey_cancel(flow_run: UUID, launcher: Launcher, done: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not done.wait(CANCEL_POLL_S):
            with contextlib.suppress(httpx.HTTPError):  # the server may be away for a while: the run goes on
                state = client.read_flow_run(flow_run).state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    launcher.end_all()
                    client.set_flow_run_state(flow_run, Cancelled(message="as asked for in Prefect"), force=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return


def _work(session: Session, validated: Validated, *, only: Sequence[str]) -> None:
    """Plan, make, report."""
    record = session.record
    record.pinned(validated.pins, only=only)
    write_json(record.folder / "preflight.json", validated.preflight)
    (record.folder / "plan.txt").write_text("\n".join(str(line) for line in validated.plan) + "\n", encoding="utf-8")
    source = {"mlflow.source.name": str(validated.loaded.path), **registered_tag(validated.registered)}
    session.tracker.start(validated.recipe.model_dump(mode="json"), tags=source)
    log = get_run_logger()
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
    session.pages.plan(_plan_markdown(validated))
    matrix = compose(validated.recipe, validated.pins, session.do, only=only)
    record.composed(matrix)
    session.collect()
    record.composed(matrix)
    record.finish("completed" if session.complete() else "failed")
    report = render(record.folder, session.store.home)
    session.pages.report(report)
    record.publish()
    session.tracker.report(report.json, record.folder, pictures=report.pictures)
    for sentence in report.json["verdict"]:
        log.info(sentence)
    log.info("report: %s", record.folder / "report.html")


def flush_log() -> None:
    """Send what the run has logged so far."""
    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()


def drain() -> None:
    """Send what Prefect's background workers still hold, before the server of this run ends."""
    flush_log()
    EventsWorker.drain_all(timeout=5)


def _plan_markdown(validated: Validated) -> str:
    rows = [
        f"| {'hit' if step.hit else 'make'} | `{step.key}` | {escaped(one_line(step.why))} |" for step in validated.plan
    ]
    return inert("\n".join(["| | step | why |", "| --- | --- | --- |", *rows]))


SCORING = ("rehearse", "reference", "choose", "evaluate", "measure", "serve")


@flow(  # pyright: ignore[reportCallIssue]
    name="evaluate-only",
    flow_run_name="{recipe}",
    task_runner=ThreadPoolTaskRunner(max_workers=WAITING_TASKS),  # pyright: ignore[reportArgumentType]
    persist_result=False,
)
def evaluate_only(recipe: str, sets: list[str] | None = None, only: list[str] | None = None) -> str:
    """Evaluate again what an earlier run made: scorers, longer answers, speed, an engine. Trains and quantizes nothing.

    Args:
        recipe: Path of the recipe file, absolute or seen from the folder where the command is typed.
        sets: Overrides of single fields, as ["evaluate.max_new_tokens=64"].
        only: Arms that are wanted, `external` for every external model.

    Returns:
        The run's folder.

    Raises:
        RecipeError: Bad input, or something that only finetune-and-quantize makes is not in the store.
        RunFailed: A step failed; the report says which and why.
    """
    settle(get_run_logger())
    with refusals_logged():
        validated = validate(Path(recipe), sets=sets or [], home=find_home(), only=only or [])
        lacking = [line for line in validated.plan if not line.hit and line.key.split("/")[0] not in SCORING]
        if problems := [_missing(line) for line in lacking]:
            raise RecipeError(problems)
    return run_validated(validated, only=only or [])


def _missing(step: Planned) -> Problem:
    return Problem(
        what=f"{step.key} is not in the store.",
        where="evaluate-only",
        why=f"It would have to be made ({step.why}), and this flow makes only scores.",
        next="Run finetune-and-quantize with this recipe first.",
    )
