"""What `quench up` registers with Prefect: a work pool of processes on this machine, and one deployment per flow."""

from __future__ import annotations

import datetime as dt
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from flows.pipeline import evaluate_only, finetune_and_quantize
from flows.retrain.flow import retrain

POOL = "quench"
NAME = "default"
WORKER = "quench up"
FLOWS = (  # those of infra/prefect.yaml; a test compares
    cast("Flow[..., str]", finetune_and_quantize),
    cast("Flow[..., str]", evaluate_only),
    cast("Flow[..., str]", retrain),
)
UNDER_WAY = ("PENDING", "RUNNING", "CANCELLING")
PAGE = 200
NOT_ENDED = TaskRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED", *UNDER_WAY]}}})


def register(folder: Path) -> list[str]:
    """Create or update pool and deployments.

    Args:
        folder: Working folder of flow runs unless a run sets its own: relative recipe paths count from there.

    Returns:
        Full names of the deployments.
    """
    with get_client(sync_client=True) as client:
        pool = WorkPoolCreate(
            name=POOL, type=ProcessWorker.type, base_job_template=job_template(), description="processes of quench up"
        )
        client.create_work_pool(pool, overwrite=True)
    names = []
    for flow in FLOWS:
        deployment = RunnerDeployment.from_flow(
            flow,
            NAME,
            work_pool_name=POOL,
            job_variables={"working_dir": str(folder)},
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        names.append(f"{flow.name}/{NAME}")
        _apply(deployment, flow, names[-1])
    return names


def _apply(deployment: RunnerDeployment, flow: Flow[..., str], name: str) -> None:
    """Create a deployment, or change only what is ours in it.

    Prefect's own `apply` would take away what people set: parameters, pause, limits, tags, and automations that
    `prefect deploy` made.
    """
    with get_client(sync_client=True) as client:
        try:
            present = client.read_deployment_by_name(name)
        except ObjectNotFound:
            deployment.apply()
            return
        ours = DeploymentUpdate(
            entrypoint=deployment.entrypoint,
            description=deployment.description,
            parameter_openapi_schema=parameter_schema(flow).model_dump(exclude_unset=True),
            work_pool_name=POOL,
            job_variables={**present.job_variables, **deployment.job_variables},
        )
        client.update_deployment(present.id, ours)


def job_template() -> dict[str, Any]:
    """Prefect's own template of a process, with our interpreter and without the current folder on its module path."""
    template = ProcessWorker.get_default_base_job_template()
    command = template["variables"]["properties"]["command"]
    command["default"] = shlex.join([sys.executable, "-P", "-m", "prefect.engine"])
    return template


def heartbeat() -> dt.datetime | None:
    """When our worker was last seen. Any change means that it lives, whatever the clock did meanwhile."""
    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(POOL)
    return next((worker.last_heartbeat_time for worker in workers if worker.name == WORKER), None)


def mark_crashed(why: str, *, dead: Sequence[str] = ()) -> list[str]:
    """Mark runs that nobody executes any more, which Prefect itself leaves Running for ever; returns their names.

    Args:
        why: Message of the state.
        dead: Ids of flow runs that no process works on. Those of the pool are looked up: no worker may live while this
            is called.
    """
    marked: list[str] = []
    crashed = Crashed(message=why)
    with get_client(sync_client=True) as client:
        while runs := [*(_under_way(client, {"id": {"any_": dead}}) if dead else ()), *_under_way(client, {}, POOL)]:
            for run in runs:
                of_run = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
                for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=NOT_ENDED):
                    client.set_task_run_state(task.id, crashed, force=True)
                client.set_flow_run_state(run.id, crashed, force=True)
            marked += [run.name for run in runs]
    return marked


def _under_way(client: SyncPrefectClient, which: dict[str, Any], pool: str | None = None) -> Sequence[FlowRun]:
    state = {"state": {"type": {"any_": UNDER_WAY}}}
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({**which, **state}),
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}) if pool else None,
        limit=PAGE,
    )
