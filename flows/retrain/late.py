"""Late runs: what a machine that slept, or a pool that was paused, leaves of a schedule.

Prefect starts each of them. One retrain sees all that the others would see, so the first that starts has the others
skipped. Runs that a person started are left alone: somebody may wait for them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import flow_run

PAGE = 200
BY_ITSELF = ("SCHEDULE", "AUTOMATION")  # Prefect's words for who created a run


def skip_late() -> list[str]:
    """Skip the runs of this run's deployment that are due, have not started, and would do the same as this one.

    Call it before the data is read: then no row is missed.

    Returns:
        A sentence that says so; none where there was none.
    """
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(flow_run.id)
        if own.deployment_id is None:
            return []
        state = State[Any](
            type=StateType.CANCELLED,  # a worker that has it in its hands already does not start it any more
            name="Skipped",
            message=f"It was late, and flow run {own.id} has the same parameters: that one does its work.",
        )
        skipped = [run for run in list(_due(client, own)) if _set(client, run, state)]
    if not skipped:
        return []
    times = sorted(run.expected_start_time for run in skipped if run.expected_start_time)
    span = " to ".join(dict.fromkeys(f"{time:%Y-%m-%d %H:%M}" for time in (times[0], times[-1])))
    runs = "1 run that was late is" if len(skipped) == 1 else f"{len(skipped)} runs that were late are"
    return [f"{runs} skipped, due {span} UTC: this one does their work."]


def _due(client: SyncPrefectClient, own: FlowRun) -> Iterator[FlowRun]:
    which = FlowRunFilter.model_validate(
        {
            "deployment_id": {"any_": [own.deployment_id]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"before_": dt.datetime.now(dt.UTC)},
        }
    )
    offset = 0
    while page := client.read_flow_runs(
        flow_run_filter=which, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=PAGE, offset=offset
    ):
        yield from (run for run in page if run.id != own.id and _is_same(run, own))
        offset += PAGE


def _is_same(run: FlowRun, own: FlowRun) -> bool:
    """Whether a schedule or an event made it, no person, also not by a retry; with this run's parameters and folder."""
    if run.created_by is None or run.created_by.type not in BY_ITSELF or run.run_count:
        return False
    return run.parameters == own.parameters and (run.job_variables or {}) == (own.job_variables or {})


def _set(client: SyncPrefectClient, run: FlowRun, state: State[Any]) -> bool:
    return client.set_flow_run_state(run.id, state).status is SetStateStatus.ACCEPT
