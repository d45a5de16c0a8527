"""Schedules that went wrong, with Prefect's own runs: late ones after a sleep, and the hours when clocks change."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_engine import run_flow
from prefect.server.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.retrain.flow import retrain
from flows.service.deployments import register

EVERY = dt.timedelta(seconds=1)
LATE = 4  # runs that have to be due before the machine "wakes up"
SCHEDULED_S = 60  # Prefect's scheduler looks each five seconds; more only where the machine is busy


@pytest.fixture
def client(prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    """Of a server with the deployments of `quench up`, and no worker: the machine sleeps."""
    monkeypatch.setenv("QUENCH_HOME", str(tmp_path / "home"))
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as made:
        register(tmp_path)
        yield made
        made.delete_deployment(made.read_deployment_by_name("retrain/default").id)


def scheduled(client: SyncPrefectClient, deployment: UUID, *recipes: Path) -> None:
    """A schedule for each recipe, until there are late runs of each."""
    every = IntervalSchedule(interval=EVERY)
    schedules = [
        DeploymentScheduleCreate(schedule=every, parameters={"recipe": str(recipe)}, slug=recipe.stem)
        for recipe in recipes
    ]
    client.create_deployment_schedules(deployment, schedules)
    deadline = time.monotonic() + SCHEDULED_S
    while min(len(late(client, deployment, recipe)) for recipe in recipes) < LATE:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for schedule in client.read_deployment_schedules(deployment):
        client.update_deployment_schedule(deployment, schedule.id, active=False)  # this removes what is not due yet


def runs(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    which = FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment]}})
    return client.read_flow_runs(flow_run_filter=which, sort=FlowRunSort.EXPECTED_START_TIME_ASC)


def late(client: SyncPrefectClient, deployment: UUID, recipe: Path) -> list[FlowRun]:
    """Runs of a recipe that are due and have not started, oldest first."""
    now = dt.datetime.now(dt.UTC)
    return [
        run
        for run in runs(client, deployment)
        if run.parameters["recipe"] == str(recipe)
        and run.state is not None
        and run.state.is_scheduled()
        and run.expected_start_time is not None
        and run.expected_start_time <= now
    ]


def test_of_late_runs_one_works_and_the_others_are_skipped(
    client: SyncPrefectClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    deployment = client.read_deployment_by_name("retrain/default").id
    scheduled(client, deployment, mine, other)
    parameters = {"recipe": str(mine)}
    person = client.create_flow_run_from_deployment(deployment, parameters=parameters)
    elsewhere = client.create_flow_run_from_deployment(
        deployment, parameters=parameters, job_variables={"working_dir": "/data/sql"}
    )
    first, *others = late(client, deployment, mine)
    theirs = late(client, deployment, other)

    # There is no recipe there: it fails, and still the others would have done no more than this one.
    state = run_flow(retrain, flow_run=first, parameters=parameters, return_type="state")
    assert state.is_failed() and "mine.yaml" in str(state.message)

    after = {run.id: run.state for run in runs(client, deployment)}
    waiting = {person.id, elsewhere.id}
    skipped = [run for run in others if run.id not in waiting]
    assert len(skipped) >= LATE - 1
    for run in skipped:
        now = after[run.id]
        assert now is not None and (now.name, now.is_cancelled()) == ("Skipped", True)
        assert now.message == f"It was late, and flow run {first.id} has the same parameters: that one does its work."
    for id in [*waiting, *(run.id for run in theirs)]:
        left = after[id]
        assert left is not None and left.is_scheduled()
    times = [f"{run.expected_start_time:%Y-%m-%d %H:%M}" for run in skipped]
    time.sleep(1)  # the run's log is sent in the background
    log = [line.message for line in client.read_logs() if line.flow_run_id == first.id]
    said = (
        f"{len(skipped)} runs that were late are skipped, due {' to '.join(dict.fromkeys((times[0], times[-1])))} UTC"
    )
    assert f"{said}: this one does their work." in log


HOUR = dt.timedelta(hours=1)
SPRING, AUTUMN = dt.datetime(2027, 3, 28, tzinfo=dt.UTC), dt.datetime(2026, 10, 25, tzinfo=dt.UTC)  # 01:00 UTC, Berlin


@pytest.mark.parametrize(
    ("cron", "day", "wanted"),
    [
        ("0 3 * * 0", SPRING, 1.0),
        ("30 2 * * 0", SPRING, 0.5),  # 02:30 is not on that day's clock: it comes at 01:30
        ("0 3 * * 0", AUTUMN, 2.0),
        ("30 2 * * 0", AUTUMN, 0.5),  # 02:30 is there twice: the first
    ],
)
def test_a_tick_comes_once_when_clocks_change(cron: str, day: dt.datetime, wanted: float) -> None:
    """Whenever Prefect computes it: a tick that it computes again has the same time, and so is the same run."""

    async def ticks() -> set[dt.datetime]:
        schedule = CronSchedule(cron=cron, timezone="Europe/Berlin")
        starts = [day - 2 * HOUR + dt.timedelta(minutes=minutes) for minutes in range(0, 300, 7)]
        dates = [await schedule.get_dates(n=2, start=start) for start in starts]
        return {date.astimezone(dt.UTC) for near in dates for date in near if abs(date - day) < dt.timedelta(days=2)}

    assert asyncio.run(ticks()) == {day + wanted * HOUR}
