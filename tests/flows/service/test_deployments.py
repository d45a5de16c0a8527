"""What people set on the deployments of `quench up` outlives its restart; the example in infra/prefect.yaml works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.service.deployments import register
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
    assert after.job_variables["working_dir"] == str(folder)
    mine = [one for one in automations if one["actions"][0].get("deployment_id") == str(there.id)]
    assert [one["trigger"]["expect"] for one in mine] == [["rows.changed"]]
