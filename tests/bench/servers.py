"""`python -m tests.bench.servers`: CPU seconds of a Prefect and an MLflow server for what a fleet asks of them.

Real servers on loopback, on SQLite, one process each; writes docs/results/servers.md, of which docs/scale.md is made.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from flows.run.server import OwnServer, prefect_settings, wait_for
from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT, Launcher
from tasks.runtime.process.ports import free_port
from tasks.runtime.step import hardware

PAGE = CHECKOUT / "docs" / "results" / "servers.md"
TASKS = 45  # steps of the quickstart
POINTS = 50  # of a step's curve, in one batch
SETTLE_S = 5.0  # Prefect writes task runs from a queue


class Cost(NamedTuple):
    """CPU of the server for one of these, its idling taken off."""

    what: str
    cpu_ms: float
    n: int


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children so far."""
    root = psutil.Process(pid)
    times = [one.cpu_times() for one in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def costs(what: str, work: Callable[[], object], *, pid: int, n: int, idle: float) -> Cost:
    """Do it n times, wait until the server has written it down, and divide what it used."""
    used, at = cpu_s(pid), time.monotonic()
    for _ in range(n):
        work()
    time.sleep(SETTLE_S)
    spent = cpu_s(pid) - used - idle * (time.monotonic() - at)
    return Cost(what, 1000 * max(spent, 0.0) / n, n)


def idling(pid: int) -> float:
    """CPU seconds a second of a server that nobody asks anything."""
    time.sleep(SETTLE_S)
    used, at = cpu_s(pid), time.monotonic()
    time.sleep(4 * SETTLE_S)
    return (cpu_s(pid) - used) / (time.monotonic() - at)


def listener(port: int | None) -> int:
    """Process id of who listens on a TCP port."""
    every = psutil.net_connections("tcp4")
    return next(one.pid for one in every if one.status == "LISTEN" and one.laddr.port == port and one.pid)


def prefect(home: Path, *, n: int) -> tuple[float, list[Cost]]:
    """Idle share, a worker's poll and heartbeat, and a run with as many tasks as the quickstart has steps."""
    os.environ.update(prefect_settings(home))
    with Launcher() as launcher:
        server = OwnServer(home, launcher)
        server.start()
        os.environ["PREFECT_API_URL"] = server.api
        server.wait()
        pid = listener(urlsplit(server.api).port)
        from prefect import flow, get_run_logger, task
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import WorkPoolCreate

        @task
        def step(number: int) -> None:
            get_run_logger().info("step %s", number)

        @flow
        def run() -> None:
            for one in [step.submit(number) for number in range(TASKS)]:
                one.wait()

        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name="quench", type="process"))
            idle = idling(pid)
            poll = partial(client.get_scheduled_flow_runs_for_work_pool, "quench")
            beat = partial(client.send_worker_heartbeat, "quench", "w", 30)
            found = [
                costs("Prefect: a worker's poll", poll, pid=pid, n=n, idle=idle),
                costs("Prefect: a worker's heartbeat", beat, pid=pid, n=n, idle=idle),
            ]
        found.append(costs(f"Prefect: a run of {TASKS} steps", run, pid=pid, n=max(1, n // 50), idle=idle))
        return idle, found


def mlflow(home: Path, *, n: int) -> tuple[float, list[Cost]]:
    """Idle share, and a step's nested run as flows/tracking/tracker.py writes it: five calls."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    log = home / "mlflow.log"
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    own = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home / 'mlflow.db'}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    program = str(Path(sys.executable).with_name("mlflow"))
    files = ["--default-artifact-root", (home / "artifacts").as_uri()]
    with Launcher() as launcher:
        child = launcher.start(["guard", "--", program, *words, *files], env={**os.environ, **own}, cwd=home, log=log)

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                    return answer.status == 200
            except (urllib.error.URLError, OSError):
                return False

        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        wait_for(answers, "the MLflow server", at=uri, child=child, log=log)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient(uri)
        experiment = client.create_experiment("scale")
        points = [Metric("loss", 1.0, 0, number) for number in range(POINTS)]
        params = [Param(f"p{number}", "1") for number in range(20)]

        def nested() -> None:
            made = client.create_run(experiment, tags={"quench.key": "step"}).info.run_id
            client.log_batch(made, params=params)
            client.log_batch(made, metrics=points)
            client.get_run(made)
            client.set_terminated(made)

        nested()
        idle = idling(child.pid)
        return idle, [costs("MLflow: a step's run, five calls", nested, pid=child.pid, n=max(1, n // 5), idle=idle)]


def page(idle: dict[str, float], found: list[Cost]) -> str:
    """docs/results/servers.md."""
    machine, versions = hardware(), locked_versions()
    rows = "\n".join(f"| {one.what} | {one.cpu_ms:.1f} | {one.n} |" for one in found)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in idle.items())
    return f"""<!-- Written by `python -m tests.bench.servers`. -->
# What Prefect and MLflow spend on us

CPU milliseconds of the server's processes for one of each, on SQLite, idling taken off (of a core: {shares}).

| | CPU ms | n |
| --- | ---: | ---: |
{rows}

{machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB, with other work on it; prefect
{versions["prefect"]}, mlflow {versions["mlflow"]}.
"""


def main() -> None:
    """Start, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="polls and heartbeats; a 50th of it runs")
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        of_mlflow, steps = mlflow(home, n=asked.n)
        of_prefect, runs = prefect(home, n=asked.n)
    text = page({"Prefect": of_prefect, "MLflow": of_mlflow}, [*runs, *steps])
    asked.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
