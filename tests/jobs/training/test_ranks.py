"""Training in real child processes: killed by SIGKILL, and as two gloo ranks through `accelerate launch`."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tasks.runtime.process.job import Execution, Job
from tasks.runtime.process.launch import Child, Launcher, child_env
from tests.jobs.build import curve
from tests.jobs.test_train import adapter, job_for
from tests.runtime.process.test_launch import alive, wait_gone

pytestmark = pytest.mark.slow  # 10 s of imports a child
SETTINGS: dict[str, Any] = {"packing": True, "dropout": 0.1, "keep": "best", "eval_steps": 3, "checkpoint_steps": 4}


def start(job: Job, launcher: Launcher) -> Child:
    own = job.out.parent / f"{job.out.name}-attempt"
    own.mkdir(exist_ok=True)
    job.dump(own / "job.json")
    return launcher.start(["run", str(own / "job.json")], env=child_env(), cwd=own, log=own / "log.txt")


def result(job: Job) -> dict[str, Any]:
    answer = json.loads((job.out.parent / f"{job.out.name}-attempt" / "result.json").read_text())
    assert answer["ok"], answer
    return answer["result"]


def finished(job: Job) -> dict[str, Any]:
    with Launcher() as launcher:
        assert start(job, launcher).wait(300) == 0, (job.out.parent / f"{job.out.name}-attempt/log.txt").read_text()
    return result(job)


def wait_for_step(job: Job, step: int) -> None:
    deadline = time.monotonic() + 200
    while max(curve(job, "train/loss"), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_training_killed_by_sigkill_has_the_curve_of_an_uninterrupted_one(base: Path, dataset: Path, tmp_path: Path):
    """Packed, with dropout and the best weights: every point of both curves is equal to the last digit."""
    whole = job_for(tmp_path / "whole", base, dataset, **SETTINGS)
    finished(whole)
    job = job_for(tmp_path / "killed", base, dataset, **SETTINGS)
    with Launcher() as launcher:
        child = start(job, launcher)
        wait_for_step(job, 7)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
    assert max(curve(job, "train/loss")) < 12
    (job.out / "events.jsonl").rename(tmp_path / "first-attempt.jsonl")
    assert finished(job)["resumed_from_step"] == 4
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "train/dev_loss"):
        print(name, *zip(curve(whole, name).items(), curve(job, name).items(), strict=True), sep="\n  ")
        assert curve(job, name) == curve(whole, name)
    assert len(curve(job, "train/loss")) == 12 and len(curve(job, "train/dev_loss")) == 4
    first, second = adapter(whole), adapter(job)
    assert all(torch.equal(first[name], second[name]) for name in first)


def listens_at(*pids: int) -> set[str]:
    """Addresses at which these processes listen: torch's store, and the ranks' own sockets."""
    connections = [connection for pid in pids for connection in psutil.Process(pid).net_connections(kind="inet")]
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


def with_ranks(job: Job, processes: int) -> Job:
    return replace(job, execution=Execution(device="cpu", threads=1, micro_batch=4, processes=processes))


def test_two_ranks_give_what_one_process_gives(base: Path, dataset: Path, tmp_path: Path):
    """Same rows a step in the same order; gradients are averaged over ranks instead of summed over micro-batches."""
    settings = SETTINGS | {"packing": False, "dropout": 0.0, "max_steps": 6}
    single = with_ranks(job_for(tmp_path / "one", base, dataset, **settings), 1)
    two = with_ranks(job_for(tmp_path / "two", base, dataset, **settings), 2)
    alone, together = finished(single), finished(two)
    for name in ("train/loss", "train/dev_loss"):
        # 1e-5 measured (training is equal to the digit here); the mean of the ranks' means would be off by 7e-3.
        assert curve(two, name) == pytest.approx(curve(single, name), rel=2e-4)
    for name in ("steps", "tokens", "padding_share", "kept_step", "trainable_parameters"):
        assert together[name] == pytest.approx(alone[name])
    first, second = adapter(single), adapter(two)
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)
    assert {path.name for path in two.out.iterdir()} == {path.name for path in single.out.iterdir()}
    events = (two.out / "events.jsonl").read_text().splitlines()
    assert sum('"train/loss"' in line for line in events) == 6  # rank 0 alone writes


def test_every_rank_dies_with_the_launcher(base: Path, dataset: Path, tmp_path: Path):
    job = with_ranks(job_for(tmp_path / "out", base, dataset, max_steps=5000, checkpoint_steps=5000), 2)
    with Launcher() as launcher:
        child = start(job, launcher)
        wait_for_step(job, 1)
        listed = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        ranks = [
            int(pid) for pid in listed if "tasks.runtime.process.child" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        assert len(ranks) == 2 and all(alive(pid) for pid in ranks)
        assert listens_at(child.pid, *ranks) == {"127.0.0.1"}
        os.kill(child.pid, signal.SIGKILL)  # no handler of torch's launcher runs
        wait_gone(ranks)
