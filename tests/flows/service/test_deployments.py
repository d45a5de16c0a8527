"""What people set on the deployments of `quench up` outlives its restart; the example in infra/prefect.yaml works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from flows.service.deployments import AT_ONCE, DESCRIPTION, ENGINE, POOL, held, register
from recipes.problem import RecipeError
from tasks.runtime.process.launch import CHECKOUT


@pytest.mark.slow
def test_schedule_automation_and_parameters_outlive_a_restart(prefect_api: str, tmp_path: Path) -> None:
    text = (CHECKOUT / "infra" / "prefect.yaml").read_text()
    example, kept = re.subn(r"^    # (schedules:|triggers:|  )", r"    \1", text, flags=re.MULTILINE)
    assert kept == 9  # every line of the example, and not the sentence above it
    path = tmp_path / "prefect.yaml"
    path.write_text(example)
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        register(tmp_path)
        program = str(Path(sys.executable).with_name("prefect"))
        words = [program, "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
        env = {**os.environ, "PREFECT_API_URL": prefect_api}
        done = subprocess.run(words, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        with get_client(sync_client=True) as client:
            there = client.read_deployment_by_name("retrain/default")
            changes = DeploymentUpdate(parameters={"promote": False}, tags=["weekly"], concurrency_limit=2)
            client.update_deployment(there.id, changes)
            client.pause_deployment(there.id)
            before = client.read_deployment_by_name("retrain/default")
            folder = tmp_path / "elsewhere"
            register(folder)
            after = client.read_deployment_by_name("retrain/default")
            automations = client.request("POST", "/automations/filter", json={}).json()
    (schedule,) = after.schedules
    assert schedule.schedule.cron == "0 3 * * 1" and schedule.parameters["notify"] == "slack-webhook/ops"
    names = ("id", "schedules", "parameters", "tags", "paused", "global_concurrency_limit", "parameter_openapi_schema")
    assert {name: getattr(after, name) for name in names} == {name: getattr(before, name) for name in names}
    assert after.paused and after.parameters == {"promote": False} and after.tags == ["weekly"]
    assert after.job_variables == before.job_variables  # what `prefect deploy` set, its folder too
    mine = [one for one in automations if one["actions"][0].get("deployment_id") == str(there.id)]
    assert [one["trigger"]["expect"] for one in mine] == [["rows.changed"]]


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    """Of a server without pool and deployments of ours, before and after."""
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as made:
        clean(made)
        yield made
        clean(made)


def clean(client: SyncPrefectClient) -> None:
    for deployment in client.read_deployments():
        client.delete_deployment(deployment.id)
    for pool in client.read_work_pools():
        client.delete_work_pool(pool.name)


def defaults(client: SyncPrefectClient) -> dict[str, Any]:
    """Default values of the pool's job template."""
    properties = client.read_work_pool(POOL).base_job_template["variables"]["properties"]
    return {name: told.get("default") for name, told in properties.items()}


def test_what_people_set_on_pool_queue_and_deployment_outlives_a_restart(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    register(tmp_path / "first")
    pool = client.read_work_pool(POOL)
    assert (pool.is_paused, pool.concurrency_limit, pool.description) == (False, AT_ONCE, DESCRIPTION)
    ours = {"working_dir": str(tmp_path / "first"), "command": shlex.join([sys.executable, *ENGINE])}
    assert defaults(client).items() >= ours.items() and not held()

    template = pool.base_job_template
    template["variables"]["properties"]["env"]["default"] = {"HF_HOME": "/data/hub"}
    people = WorkPoolUpdate(
        is_paused=True, concurrency_limit=3, description="two cards, ask Ana", base_job_template=template
    )
    client.update_work_pool(POOL, people)
    client.create_work_queue("night", concurrency_limit=1, priority=7, work_pool_name=POOL)
    (queue,) = [queue for queue in client.read_work_queues(work_pool_name=POOL) if queue.name == "night"]
    client.update_work_queue(queue.id, is_paused=True)
    retrain = client.read_deployment_by_name("retrain/default")
    assert "working_dir" not in retrain.job_variables
    changes = DeploymentUpdate(
        description="each Monday",
        work_pool_name=POOL,
        work_queue_name="night",
        job_variables={"working_dir": "/data/sql", "env": {"A": "b"}},
        concurrency_limit=1,
        concurrency_options={"collision_strategy": "CANCEL_NEW"},
    )
    client.update_deployment(retrain.id, changes)
    names = ("is_paused", "concurrency_limit", "description", "type", "storage_configuration")
    before = client.read_work_pool(POOL)
    set_before = client.read_deployment_by_name("retrain/default").model_dump(exclude={"updated", "last_polled"})

    register(tmp_path / "second")
    after = client.read_work_pool(POOL)
    assert {name: getattr(after, name) for name in names} == {name: getattr(before, name) for name in names}
    assert (after.is_paused, after.concurrency_limit) == (True, 3)
    now = defaults(client)
    assert now["working_dir"] == str(tmp_path / "second") and now["env"] == {"HF_HOME": "/data/hub"}
    queues = {queue.name: queue for queue in client.read_work_queues(work_pool_name=POOL)}
    assert (queues["night"].is_paused, queues["night"].concurrency_limit, queues["night"].priority) == (True, 1, 7)
    set_after = client.read_deployment_by_name("retrain/default").model_dump(exclude={"updated", "last_polled"})
    assert set_after == set_before and set_after["work_queue_name"] == "night"
    assert held() == [
        "the work pool quench is paused, so its runs wait; next: prefect work-pool resume quench",
        "the work queue night is paused, so its runs wait; next: prefect work-queue resume night --pool quench",
    ]
    client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False, concurrency_limit=0))
    assert held()[1:] == ["the work pool quench has a concurrency limit of 0, so its runs wait"]


def test_the_command_follows_the_checkout_unless_people_wrote_another(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    register(tmp_path)
    for written, wanted in (
        (shlex.join(["/old/.venv/bin/python", *ENGINE]), shlex.join([sys.executable, *ENGINE])),
        (f"nice -n 10 {sys.executable} -P -m prefect.engine", f"nice -n 10 {sys.executable} -P -m prefect.engine"),
        ("echo 'open", "echo 'open"),
    ):
        template = client.read_work_pool(POOL).base_job_template
        template["variables"]["properties"]["command"]["default"] = written
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
        register(tmp_path)
        assert defaults(client)["command"] == wanted


def test_a_pool_of_an_older_quench_is_taken_over_and_one_of_another_type_refused(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template, description=DESCRIPTION)
    client.create_work_pool(pool)
    register(tmp_path / "first")  # the deployments are new; an older Quench left its folder on each
    client.delete_work_pool(POOL)
    client.create_work_pool(pool)
    deployment = client.read_deployment_by_name("retrain/default")
    assert deployment.work_pool_name is None
    client.update_deployment(deployment.id, DeploymentUpdate(job_variables={"working_dir": "/gone", "env": {"A": "b"}}))
    register(tmp_path / "second")
    deployment = client.read_deployment_by_name("retrain/default")
    assert deployment.job_variables == {"env": {"A": "b"}} and deployment.work_pool_name == POOL
    assert client.read_work_pool(POOL).concurrency_limit == AT_ONCE
    assert defaults(client)["working_dir"] == str(tmp_path / "second")

    client.delete_work_pool(POOL)
    client.create_work_pool(WorkPoolCreate(name=POOL, type="docker"))
    with pytest.raises(RecipeError, match="the work pool quench is of type docker"):
        register(tmp_path)
