"""Killed at any moment, the next run repeats nothing that had finished, and nothing stays behind."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.states import Cancelling

from tests.conftest import World
from tests.flows.test_run import fingerprints

# From the signal to nothing left: the issue allows 10 s.
GONE_S = 10.0
RUNNING = FlowRunFilter.model_validate({"state": {"name": {"any_": ["Running"]}}})
# Each case drops one stage from a finished home, so that the run starts there.
FAST = ["train", "quantize"]
STAGES = ["prepare", "rehearse", "merge", "reference", "calibrate", "choose", "evaluate", "measure"]


def quick(stage: str) -> tuple[str, ...]:
    """Leave out what comes after everything, unless that is the stage in question."""
    return () if stage == "measure" else ("--set", "measure.enabled=false")


def processes_of(home: Path) -> dict[int, str]:
    """Live processes that name this home in their command line or environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            words = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if str(home).encode() in words and state != "Z":
            found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def wait_gone(home: Path) -> None:
    deadline = time.monotonic() + GONE_S
    while left := processes_of(home):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def wait_child(world: World, stage: str, run: subprocess.Popen[str]) -> int:
    """Pid of the child that works on a stage, once it has begun."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()
        for pid, words in processes_of(world.home).items():
            if f"partial/{stage}/" in words and "tasks.runtime.process.child run" in words:
                return pid
        time.sleep(0.02)
    raise AssertionError(f"no child of {stage} was seen")


def asked(path: Path) -> str:
    """What a manifest answers: the fingerprint and the digests of the inputs that were read."""
    manifest = json.loads(path.read_text())
    return manifest["fingerprint"] + json.dumps({name: one["digest"] for name, one in manifest["inputs"].items()})


def start(world: World, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        world.argv("run", str(world.recipe), *words),
        env=world.env,
        cwd=world.home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(world: World, before: dict[str, tuple[int, str]], *words: str) -> None:
    """Run again: the plan's hits are the run's hits, nothing committed was touched, one commit a fingerprint."""
    planned = world.plan(*words)
    world.quench("run", str(world.recipe), *words)
    steps = world.steps()
    assert {key for key, hit in planned.items() if hit} <= {k for k, one in steps.items() if one["status"] == "hit"}
    after = fingerprints(world.home)
    assert {name: after.get(name) for name in before} == before
    commits = Counter(asked(path) for path in (world.home / "store").glob("*/*/manifest.json"))
    assert set(commits.values()) == {1}
    assert {one["status"] for one in steps.values()} <= {"hit", "made"}


@pytest.mark.parametrize("stage", [*FAST, *(pytest.param(one, marks=pytest.mark.slow) for one in STAGES)])
def test_parent_killed_in_a_stage(world: World, stage: str):
    world.drop(stage)
    before = fingerprints(world.home)
    words = quick(stage)
    run = start(world, *words)
    wait_child(world, stage, run)
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_gone(world.home)
    assert fingerprints(world.home) == before
    finish(world, before, *words)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*FAST, *STAGES])
def test_child_killed_in_a_stage(world: World, stage: str):
    world.drop(stage)
    words = quick(stage)
    run = start(world, *words)
    os.kill(wait_child(world, stage, run), signal.SIGKILL)
    out, _ = run.communicate(timeout=1200)
    assert run.returncode == 1 and "SIGKILL" in out
    wait_gone(world.home)
    finish(world, fingerprints(world.home), *words)


@pytest.mark.slow
def test_parent_killed_whose_jobs_are_spawned(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUENCH_COLD", "1")
    test_parent_killed_in_a_stage(world, "quantize")


@pytest.mark.slow
def test_warm_parent_killed(world: World):
    """The step under way is lost with it, and made once more; nothing else is."""
    world.drop("quantize")
    words = quick("quantize")
    run = start(world, *words)
    os.kill(psutil.Process(wait_child(world, "quantize", run)).ppid(), signal.SIGKILL)
    out, _ = run.communicate(timeout=1200)
    assert run.returncode == 0 and "once more" in out
    wait_gone(world.home)
    assert {one["status"] for one in world.steps().values()} == {"hit", "made"}
    finish(world, fingerprints(world.home), *words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_child_and_no_server(world: World, number: signal.Signals):
    world.drop("train")
    env = {name: value for name, value in world.env.items() if name != "PREFECT_API_URL"}
    run = subprocess.Popen(
        world.argv("run", str(world.recipe)),
        env=env,
        cwd=world.home.parent,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    wait_child(world, "train", run)
    assert any("prefect server start" in words for words in processes_of(world.home).values())
    run.send_signal(number)
    clock = time.monotonic()
    run.communicate(timeout=60)
    wait_gone(world.home)
    assert time.monotonic() - clock < GONE_S
    assert run.returncode == 130
    runs = sorted(path for path in (world.home / "runs").iterdir() if path.name != "latest")
    assert json.loads((runs[-1] / "steps.json").read_text())["status"] == "stopped"


@pytest.mark.slow
def test_prefects_cancel_leaves_no_child(world: World, prefect_api: str, monkeypatch: pytest.MonkeyPatch):
    world.drop("train")
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    run = start(replace(world, api=prefect_api))
    wait_child(world, "train", run)
    with get_client(sync_client=True) as client:
        # Runs that other tests killed stay Running in Prefect's database: the newest is ours.
        flow_run = max(client.read_flow_runs(flow_run_filter=RUNNING), key=lambda one: one.created)
        client.set_flow_run_state(flow_run.id, Cancelling())
        clock = time.monotonic()
        out, _ = run.communicate(timeout=60)
        wait_gone(world.home)
        assert time.monotonic() - clock < GONE_S
        assert run.returncode == 130, out
        assert client.read_flow_run(flow_run.id).state.name in ("Cancelled", "Crashed")


def test_killed_between_the_rename_and_the_report(world: World):
    # Everything is committed, the run's record is not: as if the parent had died right after the last rename.
    before = fingerprints(world.home)
    for path in (world.home / "runs").iterdir():
        if path.is_symlink():
            path.unlink()
        else:
            (path / "report.json").unlink()
    finish(world, before)
    assert {one["status"] for one in world.steps().values()} == {"hit"}
    assert world.report()["arms"]
