"""run_step through the real door: a child process, a job.json, a manifest."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.job import Job
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, External, Limits, Step, run_step
from tasks.runtime.store.local import Store

MODEL = External(name="model", path=Path("model"), digest="d" * 64, source="here")


def choice(**more: object) -> Step:
    """The lightest real step: `choose` names its only input."""
    given = {
        "stage": "choose",
        "slug": "tiny",
        "entry": "tasks.jobs.choose:run",
        "version": 1,
        "params": {},
        "inputs": {"dequantized": MODEL},
    }
    return Step(**{**given, **more})  # type: ignore[arg-type]


@pytest.fixture
def context(tmp_path: Path):
    with Launcher() as launcher:
        yield Context(store=Store(tmp_path), launcher=launcher, leases=Leases(tmp_path))


def test_made_once_then_a_hit(context: Context):
    seen: list[dict[str, object]] = []
    context.on_event = lambda step, event: seen.append(event)
    lines: list[str] = []
    context.on_line = lambda step, line: lines.append(line)
    step, inputs = choice(), {"dequantized": MODEL.artifact}
    made = run_step(step, inputs, context)
    again = run_step(step, inputs, context)
    assert (made.hit, again.hit) == (False, True)
    assert made.artifact == again.artifact
    manifest = made.artifact.manifest
    assert manifest["result"] == {"candidate": "dequantized"}
    assert manifest["attempts"] == 1 and manifest["peak_rss_gib"] > 0
    assert [event["kind"] for event in seen] == ["note"]
    assert lines == ["choice: dequantized: named by the recipe (merge.base)"]


def test_job_json_round_trips(context: Context):
    made = run_step(choice(), {"dequantized": MODEL.artifact}, context)
    path = made.artifact.folder / "attempt-1" / "job.json"  # type: ignore[operator]
    job = Job.load(path)
    copy = path.with_name("copy.json")
    job.dump(copy)
    assert Job.load(copy) == job and job.entry == "tasks.jobs.choose:run"


def test_a_failure_is_never_stored_and_says_why(context: Context):
    inputs = {"dequantized": MODEL.artifact, "original": replace(MODEL, digest="e" * 64).artifact}
    step = choice(inputs={"dequantized": MODEL, "original": replace(MODEL, digest="e" * 64)})
    for attempt in (1, 2):
        with pytest.raises(StepFailed) as caught:
            run_step(step, inputs, context)
        assert caught.value.problem.what == "KeyError: 'dequantized_scores'"
        assert f"attempt-{attempt}" in caught.value.log and Path(caught.value.log).exists()
    assert not list(context.store.manifests())


def test_an_entry_that_does_not_exist_fails_with_its_name(context: Context):
    with pytest.raises(StepFailed, match="no_such_job"):
        run_step(choice(entry="tasks.jobs.no_such_job:run"), {"dequantized": MODEL.artifact}, context)


def test_identity_holds_what_was_asked_and_execution_stays_out():
    one = choice()
    assert one.fingerprint == choice().fingerprint
    assert one.fingerprint != choice(version=2).fingerprint
    assert one.fingerprint != choice(params={"seed": 1}).fingerprint
    assert one.fingerprint != choice(tools=("torch",)).fingerprint
    assert one.fingerprint == choice(gpus=1, whole_machine=True).fingerprint
    assert choice(tools=("torch",)).identity["tools"] == {"torch": locked_versions()["torch"]}


def test_a_choice_depends_on_its_lineage_alone():
    adapter = External(name="adapter", path=Path("a"), digest="a" * 64, source="a")
    one = choice(lineage={"adapter": adapter})
    two = choice(lineage={"adapter": adapter}, inputs={"original": replace(MODEL, digest="e" * 64)})
    assert one.fingerprint == two.fingerprint


def test_time_limit_and_kill_are_told_apart(context: Context):
    step = choice(entry="tests.runtime.process.hang:run")
    context.limits = Limits(time_limit_s=1)
    with pytest.raises(StepFailed, match="time_limit_s = 1"):
        run_step(step, {"dequantized": MODEL.artifact}, context)
    context.limits = Limits()
    context.on_line = lambda step, line: os.kill(int(line), signal.SIGKILL)
    with pytest.raises(StepFailed, match="SIGKILL") as caught:
        run_step(step, {"dequantized": MODEL.artifact}, context)
    assert caught.value.returncode == -signal.SIGKILL


def test_a_step_whose_warm_parent_was_killed_is_tried_once_more(tmp_path: Path):
    pids: list[int] = []

    def kill(step: Step, line: str) -> None:
        if not line.isdigit():
            return
        pids.append(int(line))
        os.kill(psutil.Process(pids[0]).ppid() if len(pids) == 1 else pids[1], signal.SIGKILL)

    with Launcher(warm=["tests.runtime.process.hang"]) as launcher:
        context = Context(store=Store(tmp_path), launcher=launcher, leases=Leases(tmp_path), on_line=kill)
        with pytest.raises(StepFailed, match="SIGKILL") as caught:
            run_step(choice(entry="tests.runtime.process.hang:run"), {"dequantized": MODEL.artifact}, context)
    assert len({*pids}) == 2 and "attempt-2" in caught.value.log


def test_stop_ends_the_child_and_stores_nothing(tmp_path: Path):
    errors: list[BaseException] = []
    with Launcher() as launcher:
        context = Context(store=Store(tmp_path), launcher=launcher, leases=Leases(tmp_path))
        running = threading.Event()
        context.on_line = lambda step, line: running.set()

        def work() -> None:
            try:
                run_step(choice(entry="tests.runtime.process.hang:run"), {"dequantized": MODEL.artifact}, context)
            except InterruptedError as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert running.wait(20)
    thread.join(10)
    assert not thread.is_alive() and len(errors) == 1
    assert not list(Store(tmp_path).manifests())


def test_a_gpu_that_is_not_there_fails_the_step_at_once(tmp_path: Path):
    with Launcher() as launcher:
        leases = Leases(tmp_path, gpus=lambda: ())
        context = Context(store=Store(tmp_path), launcher=launcher, leases=leases, limits=Limits(device="cuda"))
        with pytest.raises(StepFailed) as caught:
            run_step(choice(gpus=1), {"dequantized": MODEL.artifact}, context)
    assert "GPU" in caught.value.problem.what and "no child" in caught.value.log
