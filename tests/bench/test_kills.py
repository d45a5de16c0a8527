"""Two kills by the code that makes the kill table, and the page that shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench import operations
from tests.bench.kills import VICTIMS, Outcome, draw, series

GOOD = Outcome(
    home=0, runs=3, faults=[], steps=8, equal=8, compared=8, curve_points=24, curve_off=0.0, resumed_from_step=12
)


def test_each_victim_comes_as_often_and_a_seed_gives_the_same_kills() -> None:
    numbers = range(10 * len(VICTIMS))
    draws = [draw(0, number) for number in numbers]
    assert draws == [draw(0, number) for number in numbers] != [draw(1, number) for number in numbers]
    assert {name: sum(one[1] == name for one in draws) for name in VICTIMS} == dict.fromkeys(VICTIMS, 10)
    assert all(0 <= share < 1 for *_, share in draws)


@pytest.mark.parametrize(
    "change", [{"faults": ["made twice: train/kills"]}, {"equal": 7}, {"compared": 7, "equal": 7}, {"curve_off": 1e-6}]
)
def test_a_home_holds_only_where_everything_is_equal(change: dict[str, Any]) -> None:
    assert GOOD.holds and not replace(GOOD, **change).holds


@pytest.mark.slow
def test_two_kills_cost_nothing_that_was_committed(tmp_path: Path) -> None:
    told: dict[str, Any] = {"seed": 0, "hardware": {"cpu": "x", "cores": 2}, "versions": {}, "tolerance": 0.0}
    told |= {"kills": [], "homes": []}

    def save() -> None:
        (tmp_path / "kills.json").write_text(json.dumps(told))

    series(tmp_path, runs=2, seed=0, told=told, save=save, kills_a_home=2)
    assert [one["number"] for one in told["kills"]] == [0, 1]
    assert all(home["holds"] for home in told["homes"]), told["homes"]
    assert all(one["exit"] != 0 for one in told["kills"] if one["victim"] == "parent")
    operations.write(tmp_path)
    page = (tmp_path / "operations.md").read_text()
    for one in told["kills"]:
        assert f"| {one['victim']} | {one['moment_s']} | {one['during']} |" in page
    assert f"{len(told['homes'])} of {len(told['homes'])} do." in page and "does not hold" not in page
