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
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from flows.pipeline import evaluate_only, finetune_and_quantize
from flows.retrain.flow import retrain
from recipes.problem import Problem

POOL = "quench"
DESCRIPTION = "processes of quench up"
NAME = "default"
WORKER = "quench up"
FLOWS = (  # those of infra/prefect.yaml; a test compares
    cast("Flow[..., str]", finetune_and_quantize),
    cast("Flow[..., str]", evaluate_only),
    cast("Flow[..., str]", retrain),
)
UNDER_WAY = ("PENDING", "RUNNING", "CANCELLING")
PAGE = 200
AT_ONCE = 8  # flow runs of a new pool; each is a process of 0.4 GB that imports for seconds, and most wait for leases
ENGINE = ["-P", "-m", "prefect.engine"]  # -P: a tasks.py of the current folder is not taken for ours
NOT_ENDED = TaskRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED", *UNDER_WAY]}}})


def register(folder: Path) -> list[str]:
    """Create pool and deployments, or change only what is ours in them: see `_renew_pool` and `_renew`.

    Args:
        folder: Working folder of flow runs unless a run or its deployment sets its own: relative recipe paths count
            from there.

    Returns:
        Full names of the deployments.

    Raises:
        RecipeError: The pool is of another type.
    """
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(POOL)
        except ObjectNotFound:
            older = False
            _create_pool(client, folder)
        else:
            older = _renew_pool(client, pool, folder)
        names = []
        for flow in FLOWS:
            names.append(f"{flow.name}/{NAME}")
            deployment = RunnerDeployment.from_flow(
                flow, NAME, work_pool_name=POOL, entrypoint_type=EntrypointType.MODULE_PATH
            )
            try:
                present = client.read_deployment_by_name(names[-1])
            except ObjectNotFound:
                deployment.apply()
            else:
                _renew(client, present, deployment, flow, older=older)
    return names


def _create_pool(client: SyncPrefectClient, folder: Path) -> None:
    template = ProcessWorker.get_default_base_job_template()
    _point(template, folder)
    pool = WorkPoolCreate(
        name=POOL,
        type=ProcessWorker.type,
        base_job_template=template,
        description=DESCRIPTION,
        concurrency_limit=AT_ONCE,
    )
    client.create_work_pool(pool)


def _renew_pool(client: SyncPrefectClient, pool: WorkPool, folder: Path) -> bool:
    """Point its job template at this checkout and this folder; pause, limit and all else are what people set.

    Returns:
        Whether an older Quench made it: that one set the pool anew at each start, without a limit, and the working
        folder on each deployment.

    Raises:
        RecipeError: It is of another type.
    """
    if pool.type != ProcessWorker.type:
        raise Problem(
            what=f"the work pool {POOL} is of type {pool.type}",
            where=f"Prefect's work pool {POOL}",
            why=f"`quench up` starts a worker of type {ProcessWorker.type}, and Prefect does not change a pool's type",
            next=f"prefect work-pool delete {POOL}, or another database for `quench up`",
        ).error()
    template = pool.base_job_template
    older = pool.description == DESCRIPTION and not _property(template, "working_dir").get("default")
    _point(template, folder)
    update = WorkPoolUpdate(base_job_template=template)
    if older and pool.concurrency_limit is None:
        update = WorkPoolUpdate(base_job_template=template, concurrency_limit=AT_ONCE)
    client.update_work_pool(POOL, update)
    return older


def _point(template: dict[str, Any], folder: Path) -> None:
    """Set the template's folder, and its command unless people wrote another one."""
    _property(template, "working_dir")["default"] = str(folder)
    command = _property(template, "command")
    written = command.get("default")
    if written is None or _is_ours(written):
        command["default"] = shlex.join([sys.executable, *ENGINE])


def _is_ours(command: str) -> bool:
    """Whether a `quench up` wrote it, of this checkout or another."""
    try:
        return shlex.split(command)[1:] == ENGINE
    except ValueError:  # an open quote
        return False


def _property(template: dict[str, Any], name: str) -> dict[str, Any]:
    return template.setdefault("variables", {}).setdefault("properties", {}).setdefault(name, {"type": "string"})


def _renew(
    client: SyncPrefectClient,
    present: DeploymentResponse,
    deployment: RunnerDeployment,
    flow: Flow[..., str],
    *,
    older: bool,
) -> None:
    """Change only what is ours in a deployment: its entrypoint, and what its parameters may be.

    Prefect's own `apply` would take away what people set: parameters, pause, limits, tags, queue, description, and
    automations that `prefect deploy` made.
    """
    ours: dict[str, Any] = {
        "entrypoint": deployment.entrypoint,
        "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
    }
    if present.work_pool_name is None:  # its pool was deleted
        ours["work_pool_name"] = POOL
    if older:
        ours["job_variables"] = {name: value for name, value in present.job_variables.items() if name != "working_dir"}
    client.update_deployment(present.id, DeploymentUpdate(**ours))


def held() -> list[str]:
    """Sentences about what starts no run, because somebody paused it or limited it to none."""
    with get_client(sync_client=True) as client:
        pool, queues = client.read_work_pool(POOL), client.read_work_queues(work_pool_name=POOL)
    parts = [(f"work pool {POOL}", f"work-pool resume {POOL}", pool)]
    parts += [(f"work queue {queue.name}", f"work-queue resume {queue.name} --pool {POOL}", queue) for queue in queues]
    paused = [(name, words) for name, words, part in parts if part.is_paused]
    empty = [name for name, _, part in parts if part.concurrency_limit == 0]
    return [
        *(f"the {name} is paused, so its runs wait; next: prefect {words}" for name, words in paused),
        *(f"the {name} has a concurrency limit of 0, so its runs wait" for name in empty),
    ]


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
