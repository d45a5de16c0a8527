"""Six weeks of the real retrain on a real Prefect server, while the model loses one point a week."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.run.folder import run_files
from recipes.schema import Gate
from tasks.runtime.process.launch import CHECKOUT
from tests.flows.retrain.receiver import Receiver, receiver  # noqa: F401  the fixture

WEEKS, POINT = 6, 0.01
HANGS_S = 900  # two minutes on two slow cores
FLOW = f"""
import sys
from pathlib import Path
from flows.pipeline import drain
from flows.retrain.flow import retrain
from tests.flows.retrain.written import WrittenWeeks
weeks = WrittenWeeks(*map(Path, sys.argv[1:]))
for week in range(1, {WEEKS} + 1):
    weeks.week(week, 0.90 - {POINT} * week)
    retrain(recipe=str(weeks.recipe), notify="custom-webhook/weeks", return_state=True)
drain()
"""


@pytest.mark.slow
def test_a_point_a_week_ends_blocked_and_everybody_is_told(
    prefect_api: str,
    tmp_path: Path,
    receiver: Receiver,  # noqa: F811
) -> None:
    home, recipe = tmp_path / "home", tmp_path / "project" / "recipe.yaml"
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        CustomWebhookNotificationBlock(
            name="weeks",
            url=f"http://127.0.0.1:{receiver.server_port}/",
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        ).save("weeks", overwrite=True)
        done = subprocess.run(
            [sys.executable, "-c", FLOW, str(recipe.parent), str(home)],
            env={**os.environ, "PREFECT_API_URL": prefect_api, "QUENCH_HOME": str(home), "PYTHONPATH": str(CHECKOUT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANGS_S,
        )
        assert done.returncode == 0, done.stderr
        with get_client(sync_client=True) as client:
            named = FlowRunFilter.model_validate({"name": {"any_": [str(recipe)]}})
            flow_runs = client.read_flow_runs(flow_run_filter=named, sort=FlowRunSort.START_TIME_ASC)
    states = [run.state for run in flow_runs if run.state is not None]
    assert [state.name for state in states] == ["Completed"] * WEEKS, done.stderr

    journal = [json.loads(line) for line in (home / "promotions.jsonl").read_text().splitlines()]
    events = [line["event"] for line in journal]
    blocked = events.index("blocked")  # promotions before it
    reached = round(Gate().task / POINT)  # weeks after the first in which the whole margin is lost
    assert 1 <= blocked <= reached + 3 and events == ["promoted"] * blocked + ["blocked"] * (WEEKS - blocked)
    assert {line["champion"] for line in journal[blocked:]} == {blocked}  # unchanged from then on

    records = [json.loads(path.read_text()) for path in run_files(home, "retrain.json")]
    by_number = sorted(records, key=lambda record: record["number"])
    words = ["promoted"] * blocked + ["not promoted"] * (WEEKS - blocked)
    assert [record["outcome"] for record in by_number] == words
    for path in run_files(home, "steps.json"):
        raw = json.loads(path.read_text())
        assert raw["status"] == "completed" and {step["status"] for step in raw["steps"]} == {"hit"}

    subjects = [message["subject"].rpartition(": ")[2] for message in receiver.messages]
    assert subjects == words
    for week, (state, message, line) in enumerate(zip(states, receiver.messages, journal, strict=True), start=1):
        assert state.message is not None and " ".join(message["body"].split()).startswith(state.message[:60])
        if week <= blocked:
            assert state.message.startswith(f"Promoted: version {week} of quickstart, gptq-w4-g128 of run ")
        else:
            told = f"Not promoted ({line['outcome']}); version {blocked} stays champion."
            assert state.message.startswith(told) and line["outcome"] in ("worse", "undecided")
    assert journal[-1]["outcome"] == "worse" and "Since run" in receiver.messages[-1]["body"]
