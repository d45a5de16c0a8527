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
from collections.abc import Generator, Sequence
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

from flows.plan.lookup import Planned
from flows.plan.validate import Validated, validate
from flows.report.build import Report
from flows.run.credentials import settle
from flows.run.folder import RunRecord, new_id
from flows.run.prefect_pages import PrefectPages
from flows.session.body import RunFailed, to_its_end
from flows.session.session import Session
from flows.tracking.tracker import Tracker
from recipes.problem import Problem, RecipeError
from tasks.runtime.process.launch import Launcher
from tasks.runtime.step import Step
from tasks.runtime.store.local import find_home

WAITING_TASKS = 32  # a task only waits for its child: leases decide what runs at once
CANCEL_POLL_S = 2.0

# What most children of a run import: torch, transformers, and our own. bitsandbytes and TRL are needed by few.
WARM = ("tasks.jobs.evaluate", "tasks.jobs.quantize", "tasks.jobs.measure", "tasks.jobs.reference")


class PrefectSession(Session):
    """A run as a Prefect flow: a task a step, the log and the artifacts of the flow run."""

    def __init__(self, validated: Validated, launcher: Launcher, record: RunRecord, tracker: Tracker) -> None:
        super().__init__(validated, launcher, record, tracker, log=get_run_logger())
        self.pages = PrefectPages()

        @task(task_run_name="{key}", cache_policy=NO_CACHE, persist_result=False)
        def make(key: str) -> str:
            """Make one step; returns the committed folder."""
            return self.make(key)

        self.task = make

    def submit(self, step: Step, before: list[Any]) -> Any:
        """Hand one step to Prefect, which starts it after the tasks `before`."""
        return self.task.submit(step.key, wait_for=before)  # pyright: ignore[reportCallIssue]

    def wait(self) -> None:
        """Return when every task that was submitted has ended."""
        wait(list(self.futures.values()))

    def end(self) -> None:
        """Close the run in MLflow, link its page, and say what either of the two lacks."""
        super().end()
        if url := self.tracker.compare_url:
            self.pages.link(url)
        for line in dict.fromkeys(self.pages.trouble):
            self.display.line(f"Prefect does not show {line}", style="yellow")

    def log_warning(self, text: str) -> None:
        """Into the log of the task where one is at work."""
        if TaskRunContext.get() or FlowRunContext.get():
            get_run_logger().warning("%s", text)

    def on_event(self, step: Step, event: dict[str, Any]) -> None:
        """As everywhere; and a Prefect progress artifact."""
        super().on_event(step, event)
        if event["kind"] == "progress" and TaskRunContext.get():
            self.pages.progress(step.key, 100.0 * event["done"] / max(event["total"], 1))

    def on_line(self, step: Step, line: str) -> None:
        """A line of a child's log: into the Prefect run's log."""
        if TaskRunContext.get():
            get_run_logger().info("%s | %s", step.key, line)

    def show_plan(self, markdown: str) -> None:
        """As a Markdown artifact."""
        self.pages.plan(markdown)

    def show_report(self, report: Report) -> None:
        """As Markdown, table, picture and link artifacts."""
        self.pages.report(report)


def session_class() -> type[PrefectSession]:
    """The session that the flow's task runner asks for: one on Ray has its own."""
    context = FlowRunContext.get()
    return getattr(context and context.task_runner, "session", PrefectSession)


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
        try:
            folder = to_its_end(session_class()(validated, launcher, record, tracker), only=only)
        except RunFailed:
            flush_log()
            raise
    flush_log()
    return folder


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


def flush_log() -> None:
    """Send what the run has logged so far."""
    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()


def drain() -> None:
    """Send what Prefect's background workers still hold, before the server of this run ends."""
    flush_log()
    EventsWorker.drain_all(timeout=5)


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
