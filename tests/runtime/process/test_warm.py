"""Jobs forked from a warm parent are as alone as spawned ones, and nothing outlives the launcher."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.runtime.process.job import Job
from tasks.runtime.process.launch import CHECKOUT, Child, Launcher, child_env
from tests.runtime.process.test_launch import wait_gone

TOLD = "tests.runtime.process.told"
HANG = "tests.runtime.process.hang"
ENDS_S = 60.0


def start(launcher: Launcher, folder: Path, module: str, *, env: Mapping[str, str] | None = None) -> Child:
    """Start a job that may be forked, in a folder of its own."""
    folder.mkdir(parents=True)
    job = Job(
        stage="any",
        slug=folder.name,
        fingerprint="0" * 12,
        entry=f"{module}:run",
        params={},
        inputs={},
        out=folder,
        checkpoint=folder,
    )
    job.dump(folder / "job.json")
    return launcher.start(
        ["run", str(folder / "job.json")], env=env or child_env(), cwd=folder, log=folder / "log.txt", warm=True
    )


def seen(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "seen.json").read_text())


def parent(folder: Path) -> int:
    return json.loads((folder / "result.json").read_text())["result"]["parent"]


def wait_log(folder: Path) -> int:
    """The pid that a hanging job says."""
    deadline = time.monotonic() + ENDS_S
    while not (text := (folder / "log.txt").read_text()).strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(text)


def test_a_forked_job_is_as_alone_as_a_spawned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    with Launcher(warm=[TOLD]) as launcher:
        for name in ("first", "second"):
            assert start(launcher, tmp_path / name, TOLD).wait(ENDS_S) == 0
    with Launcher() as launcher:
        assert start(launcher, tmp_path / "cold", TOLD).wait(ENDS_S) == 0
    draws = {seen(tmp_path / name).pop("draw") for name in ("first", "second", "cold")}
    assert len(draws) == 3
    for name in ("first", "second", "cold"):
        told = seen(tmp_path / name)
        assert told.pop("cwd") == str(tmp_path / name) and told.pop("draw") in draws
        assert told == {
            "traces": [],
            "planted": None,
            "token": None,
            "threads": "1",
            "session": True,
            "stdin": "",
            "descriptors": [0, 1, 2],
            "allocator": None,
        }
        assert (tmp_path / name / "log.txt").read_text() == f"said {name}\n"
    assert parent(tmp_path / "first") == parent(tmp_path / "second") != os.getpid()
    assert parent(tmp_path / "cold") == os.getpid()
    wait_gone([parent(tmp_path / "first")])


def test_a_job_with_other_variables_is_spawned(tmp_path: Path) -> None:
    with Launcher(warm=[TOLD]) as launcher:
        for name, threads in (("first", 1), ("other", 2), ("third", 1)):
            assert start(launcher, tmp_path / name, TOLD, env=child_env(threads=threads)).wait(ENDS_S) == 0
    assert [seen(tmp_path / name)["threads"] for name in ("first", "other", "third")] == ["1", "2", "1"]
    assert parent(tmp_path / "first") == parent(tmp_path / "third") != parent(tmp_path / "other") == os.getpid()


def test_quench_cold_spawns_every_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUENCH_COLD", "1")
    with Launcher(warm=[TOLD]) as launcher:
        assert start(launcher, tmp_path / "job", TOLD).wait(ENDS_S) == 0
    assert parent(tmp_path / "job") == os.getpid()


@pytest.mark.parametrize(
    ("module", "why"),
    [("tests.runtime.process.threaded", "no warm parent: the imports started 1 thread(s)"), ("no_such", "no_such")],
)
def test_where_a_fork_cannot_be_whole_jobs_are_spawned(tmp_path: Path, module: str, why: str) -> None:
    with Launcher(warm=[module]) as launcher:
        for name in ("first", "second"):
            assert start(launcher, tmp_path / name, TOLD).wait(ENDS_S) == 0
            assert parent(tmp_path / name) == os.getpid()
    assert why in (tmp_path / "first" / "log.txt").read_text()
    assert (tmp_path / "second" / "log.txt").read_text() == "said second\n"  # it was tried once


def test_a_job_that_is_killed_ends_alone(tmp_path: Path) -> None:
    with Launcher(warm=[HANG]) as launcher:
        killed, other = (start(launcher, tmp_path / name, HANG) for name in ("killed", "other"))
        assert [wait_log(tmp_path / name) for name in ("killed", "other")] == [killed.pid, other.pid]
        assert f"child run {tmp_path / 'killed'}" in " ".join(psutil.Process(killed.pid).cmdline())
        killed.signal(signal.SIGKILL)
        assert killed.wait(ENDS_S) == -signal.SIGKILL and not killed.lost
        launcher.end(other)
        assert other.wait(ENDS_S) == -signal.SIGTERM and not other.lost


def test_a_killed_parent_loses_its_jobs_and_another_takes_its_place(tmp_path: Path) -> None:
    with Launcher(warm=[HANG]) as launcher:
        lost = start(launcher, tmp_path / "lost", HANG)
        forker = psutil.Process(wait_log(tmp_path / "lost")).ppid()
        assert forker != os.getpid()
        os.kill(forker, signal.SIGKILL)
        assert lost.wait(ENDS_S) == -signal.SIGKILL and lost.lost
        wait_gone([lost.pid, forker])
        again = start(launcher, tmp_path / "again", HANG)
        assert psutil.Process(wait_log(tmp_path / "again")).ppid() not in (forker, os.getpid())
    wait_gone([again.pid])


def test_a_launcher_that_ends_does_not_wait_for_imports(tmp_path: Path) -> None:
    (tmp_path / "slow_import.py").write_text("import time; time.sleep(600)")
    env = {**child_env(), "PYTHONPATH": f"{CHECKOUT}:{tmp_path}"}
    launcher = Launcher(warm=["slow_import"])
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            start(launcher, tmp_path / "job", TOLD, env=env)
        except InterruptedError as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + ENDS_S
    while not (importing := [one for one in psutil.Process().children() if "slow_import" in one.cmdline()]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.end_all()
    thread.join(ENDS_S)
    assert len(caught) == 1
    wait_gone([one.pid for one in importing])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_die_with_the_flow(tmp_path: Path, number: signal.Signals) -> None:
    script = f"""
import sys, time
from pathlib import Path
from tasks.runtime.process.launch import Launcher
from tests.runtime.process.test_warm import HANG, start, wait_log
launcher = Launcher(warm=[HANG])
folder = Path({str(tmp_path)!r}) / "job"
start(launcher, folder, HANG)
print(wait_log(folder), flush=True)
time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    flow = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    assert flow.stdout
    job = int(flow.stdout.readline())
    forker = psutil.Process(job).ppid()
    assert forker != flow.pid
    flow.send_signal(number)
    flow.wait()
    wait_gone([job, forker])
