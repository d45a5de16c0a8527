"""Scorers through `quench run`: what is wrong with them costs no training, what fails on an answer costs one cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.pipeline import SCORING
from tests.conftest import QUICKSTART, World

pytestmark = pytest.mark.slow
SQL = f"{{kind: sql-execution, databases: {QUICKSTART / 'data' / 'databases'}}}"


def scorers(world: World, *more: str) -> tuple[str, ...]:
    return ("--set", f"evaluate.scorers=[{', '.join([SQL, *more])}]", "--set", "measure.enabled=false")


def test_a_scorer_that_rejects_the_data_is_found_before_training(world: World) -> None:
    world.drop("train")
    done = world.quench("run", str(world.recipe), *scorers(world, "{kind: number}"), check=1)
    steps = world.steps()
    assert steps["prepare/small"]["status"] == "hit" and steps["rehearse/small"]["status"] == "failed"
    assert steps["train/small"]["status"] == steps["evaluate/base"]["status"] == "skipped"
    assert "rehearse/small was not made" in json.dumps(steps["train/small"]["problem"])
    assert "the scorer number rejects the reference answers" in done.stderr
    report = world.report()
    assert all(arm["status"] == "failed" for arm in report["arms"].values())
    assert "the scorer number rejects" in report["not_ranked"]["base"]


def test_a_function_that_raises_on_one_arm_costs_that_arms_cell(world: World, tmp_path: Path) -> None:
    """The untrained base answers in prose, the trained models in SQL; the function reads nothing else."""
    own = tmp_path / "own.py"
    own.write_text(
        "def strict(answer, reference, columns):\n"
        "    if not answer.lstrip().upper().startswith('SELECT'):\n"
        "        raise ValueError('no query: ' + answer[:20])\n"
        "    return answer.strip() == reference.strip()\n"
    )
    entry = f"{{kind: python, name: strict, callable: '{own}:strict'}}"
    allowed = (*scorers(world, entry), "--allow-python", str(own))
    done = world.quench("run", str(world.recipe), *allowed, check=1)
    report = world.report()
    (code,) = report["code"]
    assert code["source"] == f"{own}:strict" and code["allowed_by"] == str(own) and len(code["digest"]) == 64
    found = {slug: arm["metrics"]["task.strict"] for slug, arm in report["arms"].items()}
    empty = [slug for slug, cell in found.items() if cell["value"] is None]
    assert "base" in empty and "ValueError: no query" in found["base"]["reason"]
    assert "evaluate/base (task.strict)" in done.stderr
    able = [arm for arm in report["arms"].values() if arm["role"] != "null"]
    assert all(arm["ranked"] and arm["metrics"]["task"]["value"] is not None for arm in able)
    assert {one["step"] for one in report["failures"]} == {f"evaluate/{slug}" for slug in empty}
    assert {one["status"] for one in world.steps().values()} == {"hit", "made"}  # nothing is lost
    again = world.quench("run", str(world.recipe), *allowed, check=1)
    assert {one["status"] for one in world.steps().values()} == {"hit"} and "task.strict" in again.stderr
    own.write_text(own.read_text().replace("raise ValueError('no query: ' + answer[:20])", "return 0"))
    planned = world.plan(*allowed)
    again_made = {key.split("/")[0] for key, hit in planned.items() if not hit}
    assert again_made == {"rehearse", "evaluate"} and again_made < set(SCORING)  # evaluate-only would do
    world.quench("run", str(world.recipe), *allowed)
