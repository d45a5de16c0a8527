"""Two runs at once in one home: the terminal of each shows its own report, whichever ends last."""

from __future__ import annotations

import json
import pickle
import subprocess
import time
from pathlib import Path

import pytest

from flows.pipeline import RunFailed
from flows.run.folder import RunRecord, new_id
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
