"""Scheduled retraining on loopback: real `quench up`, a schedule of seconds, a data folder that grows, a receiver."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.retrain.flow import Before, RetrainOptions, turn, why
from flows.retrain.row_changes import Changes
from flows.run.folder import run_files
from tasks.runtime.process.launch import CHECKOUT
from tests.flows.retrain.receiver import Receiver, receiver  # noqa: F401  the fixture
from tests.flows.service.test_up import Project
from tests.flows.test_resume import wait_gone
from tests.tiny import write_base

EVERY_S = (
    60  # each tick starts an engine, which imports for 20 s and more on a busy core: 30 left none for the training
)
LONG_S = 900  # a pipeline of fourteen children takes two minutes on an idle core
SKIPPED_S = 15  # it ends "in seconds": two on an idle core, most of them Prefect's; the rest is for a busy machine
COLOURS = ("blue", "green", "red")
RECIPE = """
name: tiny
model: {base: base}
data: {path: rows, domain: kind, group: id, max_length: 64, test: 0.2}
train: {rank: 4, max_steps: 2, batch_size: 8}
calibrate: {rows: 128, max_near_duplicates: 1.0}
quantize: {schemes: [rtn-w4-g128]}
evaluate: {max_new_tokens: 8, batch_size: 64}
measure: {enabled: false}
gate: {task: 0.99, domain_task: 0.99, loss: 9.0, domain_loss: 9.0, better_than_base: false}
"""
TOO_SHORT = "run: {time_limit_s: 1}\n"
OTHER = "promote: {prefer: merged-dequantized}\n"  # another artifact, all of whose steps are in the store


def rows(numbers: range, kind: str = "colour", shift: int = 0) -> list[str]:
    return [
        json.dumps({"prompt": f"what is {one} ?", "completion": COLOURS[(one + shift) % 3], "kind": kind, "id": one})
        for one in numbers
    ]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path / "project")
    write_base(made.folder / "base")
    (made.folder / "rows").mkdir()
    (made.folder / "rows" / "0.jsonl").write_text("\n".join(rows(range(240))) + "\n")
    (made.folder / "recipe.yaml").write_text(RECIPE + TOO_SHORT)
    yield made
    made.kill()


def states(project: Project) -> list[tuple[str, str]]:
    """Name and message of the last state of all flow runs that ended, in the order of their ends."""
    return asked(
        project,
        "select s.name, s.message from flow_run r join flow_run_state s on s.id = r.state_id "
        "where r.state_type in ('COMPLETED', 'FAILED', 'CRASHED') order by r.end_time",
    )


def asked(project: Project, query: str) -> list[tuple[str, ...]]:
    """Answer of Prefect's database."""
    with contextlib.closing(sqlite3.connect(project.home / "prefect" / "prefect.db")) as database:
        return database.execute(query).fetchall()


def wait(ready: Callable[[], Any], project: Project) -> Any:
    deadline = time.monotonic() + LONG_S
    while not (found := ready()):
        assert time.monotonic() < deadline, (states(project), (project.home / "up" / "worker.log").read_text()[-5000:])
        time.sleep(0.5)
    return found


def records(project: Project) -> list[dict[str, Any]]:
    """retrain.json of every run that has one, oldest first."""
    paths = run_files(project.home, "retrain.json")
    return [json.loads(path.read_text()) | {"run": path.parent} for path in paths]


def journal(project: Project) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.home / "promotions.jsonl").read_text().splitlines()]


def prefect(project: Project, *words: str) -> str:
    program = str(Path(sys.executable).with_name("prefect"))
    done = subprocess.run(
        [program, *words],
        cwd=project.folder,
        env={**project.env, "HOME": str(project.folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_schedule_retrains_on_new_rows_and_skips_without(
    project: Project,
    receiver: Receiver,  # noqa: F811
) -> None:
    process = project.up()
    api = json.loads((project.home / "up.json").read_text())["prefect"]
    with temporary_settings({PREFECT_API_URL: api}):
        CustomWebhookNotificationBlock(
            name="receiver",
            url=f"http://127.0.0.1:{receiver.server_port}/",
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        ).save("receiver")
        with get_client(sync_client=True) as client:
            id = client.read_deployment_by_name("retrain/default").id
            schedule = DeploymentScheduleCreate(
                schedule=IntervalSchedule(interval=dt.timedelta(seconds=EVERY_S)),
                parameters={"notify": "custom-webhook/receiver"},
            )
            client.create_deployment_schedules(id, [schedule])

    # A training that fails is told, and is not taken for one that saw these rows.
    wait(lambda: receiver.of("failed"), project)
    assert "RunFailed" in receiver.of("failed")[0] and "report.md" in receiver.of("failed")[0]
    assert not records(project)
    (project.folder / "recipe.yaml").write_text(RECIPE)

    first = wait(lambda: receiver.of("promoted"), project)[0]
    assert first.startswith("Promoted: version 1 of tiny, rtn-w4-g128 of run ") and "First retrain" in first
    (record,) = records(project)
    assert record["before"] is None and record["decision"]["promotion"]["champion"] is None
    assert f"{record['run']}/report.html" in first

    nothing = f"Nothing changed since run {record['run'].name}: rows, recipe, packages."
    wait(lambda: ("Skipped", nothing) in states(project), project)
    assert len(records(project)) == 1 and len(receiver.of("promoted")) == 1 and not receiver.of("skipped")

    # The folder grows; the receiver is away for a moment.
    receiver.refuse = 1
    with turn(
        project.home, RetrainOptions(recipe=project.folder / "recipe.yaml", sets=[], promote=True), print
    ) as ours:
        assert ours
        changed = [*rows(range(2), shift=1), *rows(range(2, 239))]
        (project.folder / "rows" / "0.jsonl").write_text("\n".join(changed) + "\n")
        (project.folder / "rows" / "1.jsonl").write_text("\n".join(rows(range(240, 270), "number")) + "\n")
    second = wait(lambda: receiver.of("promoted")[1:], project)[0]
    counted = "rows 30 added, 1 removed, 2 edited (number: 30 added; colour: 1 removed, 2 edited)."
    assert second.startswith("Promoted: version 2 of tiny") and counted in second and receiver.refused == 1
    made = records(project)[1]
    assert made["before"] == record["run"].name
    assert made["changes"] == {
        "added": {"number": 30},
        "removed": {"colour": 1},
        "edited": {"colour": 2},
    }
    report = json.loads((made["run"] / "report.json").read_text())
    assert report["gate"]["outcome"] == "pass" and report["gate"]["champion"]["version"] == 1
    assert report["gate"]["champion"]["compared"]  # on the present test set, whose rows it had not been trained on
    assert report["because"] == [f"Since run {record['run'].name}: {counted}"]
    assert counted in (made["run"] / "report.md").read_text() and counted in (made["run"] / "report.html").read_text()
    steps = json.loads((made["run"] / "steps.json").read_text())["steps"]
    assert {one["key"]: one["status"] for one in steps}["train/tiny"] == "made"

    # An event starts it as well; the recipe's gate decides, and says why not.
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        for one in client.read_deployment_schedules(id):
            client.delete_deployment_schedule(id, one.id)
    wait(lambda: not set(project.states()) & {"Running", "Pending", "Scheduled", "Late"}, project)
    (project.folder / "recipe.yaml").write_text(RECIPE.replace("task: 0.99,", "task: 0.001,", 1) + OTHER)
    automation = {
        "name": "rows",
        "trigger": {"type": "event", "expect": ["rows.changed"], "match": {"prefect.resource.id": "sql"}}
        | {"posture": "Reactive", "threshold": 1, "within": 0},
        "actions": [
            {
                "type": "run-deployment",
                "source": "selected",
                "deployment_id": str(id),
                "parameters": {"recipe": "recipe.yaml", "notify": "custom-webhook/receiver"},
            }
        ],
    }
    prefect(project, "automation", "create", "--from-json", json.dumps(automation))
    prefect(project, "event", "emit", "rows.changed", "--resource-id", "sql")
    third = wait(lambda: receiver.of("not promoted"), project)[0]
    last = records(project)[2]
    gate = json.loads((last["run"] / "report.json").read_text())["gate"]
    assert gate["outcome"] in ("worse", "undecided") and gate["champion"]["version"] == 2
    assert third.startswith(f"Not promoted ({gate['outcome']}); version 2 stays champion.")
    assert gate["text"][1] in third and "promote.prefer: null -> " in third  # the gate's own reason
    assert [(one["version"], one["event"]) for one in journal(project)] == [
        (1, "promoted"),
        (2, "promoted"),
        (3, "blocked"),
    ]
    steps = json.loads((last["run"] / "steps.json").read_text())["steps"]
    assert {one["status"] for one in steps} == {"hit"}

    # Nothing new, and nobody listens: skipped without torch, in seconds, and the message is a failed task.
    receiver.refuse = 99
    words = (
        "import json, sys, time; from flows.retrain.flow import retrain; clock = time.monotonic();"
        "retrain(return_state=True); seconds = time.monotonic() - clock;"
        "state = retrain(notify='custom-webhook/receiver', notify_skipped=True, return_state=True);"
        "print(json.dumps([state.name, state.message, 'torch' in sys.modules, seconds]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", words],
        cwd=project.folder,
        env=project.env | {"PREFECT_API_URL": api, "QUENCH_HOME": str(project.home), "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    name, message, torch, seconds = json.loads(done.stdout.splitlines()[-1])
    assert (
        (name, torch) == ("Skipped", False)
        and seconds < SKIPPED_S
        and message.startswith(f"Nothing changed since run {last['run'].name}")
    )
    assert "503" in done.stderr
    failed = "select name from task_run where name like 'notify%' and state_name = 'Failed'"
    assert len(wait(lambda: asked(project, failed), project)) == 1
    process.terminate()
    assert process.wait(60) == 0
    wait_gone(project.home)


def test_one_retrain_works_one_waits_and_a_third_is_not_needed(tmp_path: Path) -> None:
    mine = RetrainOptions(recipe=tmp_path / "recipe.yaml", sets=[], promote=True)
    said: list[str] = []
    got: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        def say(text: str) -> None:
            said.append(text)
            waiting.set()

        with turn(tmp_path, mine, say) as ours:
            got.append(f"second {ours}")

    with turn(tmp_path, mine, said.append) as first:
        assert first
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        with turn(tmp_path, mine, said.append) as third:
            assert not third
        with turn(
            tmp_path, RetrainOptions(recipe=tmp_path / "other.yaml", sets=[], promote=True), said.append
        ) as other:
            assert other
        got.append("first ends")
    thread.join(10)
    assert got == ["first ends", "second True"] and said == ["waiting: a retrain of this recipe is under way"]


def saw(**parts: Any) -> dict[str, Any]:
    plain = {
        "data": ["a"],
        "recipe": {"train": {"rank": 8}},
        "inputs": {"base": "b"},
        "versions": {"torch": "2.13.0", "step train": 4},
        "promote": True,
    }
    return plain | parts


def test_reasons_name_what_changed(tmp_path: Path) -> None:
    before = Before(tmp_path / "run-1", 1, saw())
    none = Changes(added={}, removed={}, edited={})
    assert why(None, saw(), None) == ["First retrain of this recipe."]
    assert why(before, saw(data=["other bytes"]), none) == []
    assert why(before, saw(data=["c"]), Changes(added={"": 3}, removed={}, edited={})) == [
        "Since run run-1: rows 3 added."
    ]
    assert why(before, saw(recipe={"train": {"rank": 16}}, promote=False), none) == [
        "Recipe: train.rank: 8 -> 16.",
        "It is not to promote any more.",
    ]
    more = {"torch": "2.14.0", "step train": 4, "gptqmodel": "7.6.0"}  # a tool more comes with a scheme of the recipe
    assert why(before, saw(versions=more, inputs={"base": "d"}), none) == [
        'Inputs: base: "b" -> "d".',
        'Packages and steps: torch: "2.13.0" -> "2.14.0".',
    ]
