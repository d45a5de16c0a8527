"""A machine that slept: `quench up` with its real worker, and more late runs than processes that may run at once."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolUpdate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.run.folder import run_files
from flows.service.deployments import POOL
from tests.flows.retrain.written import WrittenWeeks
from tests.flows.service.test_up import Project
from tests.flows.test_resume import processes_of, wait_gone

EVERY_S, LATE = 2, 12
AT_ONCE = 3  # instead of eight: each imports for 20 s on a slow core
LONG_S = 600


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path / "project")
    WrittenWeeks(made.folder, made.home).week(1, 0.9)
    yield made
    made.kill()


@pytest.fixture
def up(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """`quench up`, which would start its parts again where a failed test only killed those."""
    process = project.up()
    yield process
    process.kill()


def states(project: Project) -> Counter[str]:
    """How many retrains are in which state; those that are not due yet do not count."""
    query = "select state_name from flow_run where expected_start_time <= ? or state_type != 'SCHEDULED'"
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.closing(sqlite3.connect(project.home / "prefect" / "prefect.db")) as database:
        return Counter(name for (name,) in database.execute(query, [now]))


@pytest.mark.slow
def test_after_a_sleep_there_is_one_retrain_and_no_storm(project: Project, up: subprocess.Popen[bytes]) -> None:
    api = json.loads((project.home / "up.json").read_text())["prefect"]
    (worker,) = [
        pid
        for pid, words in processes_of(project.home).items()
        if "bin/prefect worker" in words and "guard" not in words
    ]
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=AT_ONCE))
        deployment = client.read_deployment_by_name("retrain/default").id
        os.kill(worker, signal.SIGSTOP)
        every = IntervalSchedule(interval=dt.timedelta(seconds=EVERY_S))
        client.create_deployment_schedules(deployment, [DeploymentScheduleCreate(schedule=every)])
        deadline = time.monotonic() + LONG_S
        while states(project)["Late"] < LATE:
            assert time.monotonic() < deadline, states(project)
            time.sleep(0.5)
        for schedule in client.read_deployment_schedules(deployment):
            client.update_deployment_schedule(deployment, schedule.id, active=False)  # this removes what is not due yet
    os.kill(worker, signal.SIGCONT)
    most = 0
    while (now := states(project)).keys() - {"Skipped", "Completed"}:
        assert time.monotonic() < deadline and "Failed" not in now, (now, project.out.read_text())
        most = max(most, now["Running"] + now["Pending"])
        time.sleep(0.2)
    due = now.total()  # at the end: one may become due while the schedule is switched off
    assert most <= AT_ONCE and due >= LATE
    assert now["Completed"] == 1 and now["Skipped"] == due - 1
    assert len(run_files(project.home, "retrain.json")) == 1
    query = "select count(*) from flow_run where state_type = 'CANCELLED' and run_count = 0"
    with contextlib.closing(sqlite3.connect(project.home / "prefect" / "prefect.db")) as database:
        ((never_started,),) = database.execute(query).fetchall()
    assert never_started >= due - 2 * AT_ONCE  # the rest was in the worker's hands before the first one looked
    up.terminate()
    assert up.wait(60) == 0
    wait_gone(project.home)
