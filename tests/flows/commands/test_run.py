"""Two runs at once in one home: each shows its own report. A run of hits needs no Prefect."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.run.folder import RunRecord, new_id
from flows.session.body import RunFailed
from flows.tracking.connection import WHOLE, runs_of
from recipes.read.load import load
from tasks.runtime.process.launch import CHECKOUT
from tests.conftest import World
from tests.tiny import write_base

END_S = 300  # some 30 s on two slow cores
RECIPE = """
name: fails
model: {base: base}
data: {path: rows.jsonl, max_length: 64, test: 0.2}
train: {rank: 4, max_steps: 2, batch_size: 8}
calibrate: {rows: 128, max_near_duplicates: 1.0}
quantize: {schemes: [rtn-w4-g128]}
evaluate: {max_new_tokens: 8, batch_size: 64}
measure: {enabled: false}
run: {time_limit_s: 1}  # a step takes longer
"""


@pytest.mark.slow
def test_a_run_that_fails_prints_its_own_report_though_another_one_ended_after_it(
    prefect_api: str, tmp_path: Path
) -> None:
    world = World(home=tmp_path / "home", recipe=tmp_path / "recipe.yaml", api=prefect_api)
    write_base(tmp_path / "base")
    rows = [{"prompt": f"what is {number} ?", "completion": f"{number} is blue"} for number in range(240)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.recipe.write_text(RECIPE)
    other = RunRecord(world.home, load(CHECKOUT / "recipes" / "quickstart" / "recipe.yaml"), id=new_id("other"))

    run = subprocess.Popen(
        world.argv("run", str(world.recipe), "--json"),
        env=world.env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    latest, deadline = world.home / "runs" / "latest", time.monotonic() + END_S
    while not latest.is_symlink():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.005)
    own = latest.resolve().name
    other.publish()  # it ends between the report of the first and its last line
    out, error = run.communicate(timeout=END_S)
    assert latest.resolve() == other.folder and run.returncode == 1, error
    report = json.loads(out)
    assert report["id"] == own and f"{own}/report.md" in error


def test_what_a_failed_run_raises_names_its_folder() -> None:
    error = RunFailed(["train/sql", "quantize/awq"], "/home/runs/20261130-120000-sql-ab12")
    assert str(error) == "train/sql, quantize/awq failed; see /home/runs/20261130-120000-sql-ab12/report.md"
    again = pickle.loads(pickle.dumps(error))  # Prefect may hand it on from another process
    assert (again.folder, list(again.failed), str(again)) == (error.folder, list(error.failed), str(error))


def test_only_the_run_folder_knows_of_runs_latest() -> None:
    """`find_run` reads it for somebody who named no run; a run that works has an id."""
    paths = [path for package in ("flows", "tasks") for path in (CHECKOUT / package).rglob("*.py")]
    readers = [str(path.relative_to(CHECKOUT)) for path in paths if '"latest"' in path.read_text(encoding="utf-8")]
    assert readers == ["flows/run/folder.py"]


def test_a_run_of_hits_starts_no_prefect_and_reports_the_same(world: World) -> None:
    before = world.report()
    alone = {name: value for name, value in world.env.items() if name != "PREFECT_API_URL"}
    words = world.argv("run", str(world.recipe), "--json")
    run = subprocess.run(words, env=alone, cwd=world.home.parent, capture_output=True, text=True, timeout=END_S)
    assert run.returncode == 0 and "needs no Prefect" in run.stderr, run.stderr
    assert not (world.home / "prefect").exists()
    raw = json.loads((world.home / "runs" / "latest" / "steps.json").read_text())
    assert raw["flow_run"] is None and raw["status"] == "completed"
    assert {step["status"] for step in raw["steps"]} == {"hit"}
    after = world.report()
    assert before["id"] != after["id"]
    for section in ("arms", "comparisons", "verdict", "answers", "gate", "nulls"):
        assert before[section] == after[section], section
    mlflow = MlflowClient(f"sqlite:///{world.home / 'mlflow.db'}")
    found = runs_of(mlflow, mlflow.get_experiment_by_name("small").experiment_id, raw["id"])
    assert [WHOLE in run.data.tags for run in found if run.data.tags["quench.kind"] == "run"] == [True]
    assert [run for run in found if run.data.tags["quench.kind"] == "arm"]


VANISHES = """
import shutil, sys
from pathlib import Path
from flows.plan.validate import validate
from flows.session.body import run_hits
from recipes.problem import RecipeError

home = Path(sys.argv[2])
validated = validate(Path(sys.argv[1]), sets=[], home=home)
assert all(step.hit for step in validated.plan)
(gone,) = (home / "store" / "evaluate").glob("gptq-w4-g128-*")
shutil.rmtree(gone)
try:
    run_hits(validated, only=[])
except RecipeError as error:
    print(error)
"""


def test_a_hit_that_vanishes_after_the_plan_ends_the_run_with_what_to_type(world: World) -> None:
    words = [sys.executable, "-c", VANISHES, str(world.recipe), str(world.home)]
    run = subprocess.run(words, env=world.env, cwd=CHECKOUT, capture_output=True, text=True, timeout=END_S)
    assert run.stdout.startswith("evaluate/gptq-w4-g128 is not in the store any more"), run.stdout + run.stderr
    assert "next:" in run.stdout and "again" in run.stdout
    stopped = max((world.home / "runs").glob("2*"), key=lambda folder: folder.stat().st_mtime_ns)
    assert json.loads((stopped / "steps.json").read_text())["status"] == "stopped"
