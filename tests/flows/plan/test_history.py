"""Seconds of a plan: by this home's own runs on such a GPU, scaled by tokens; else none."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.plan.history import Seconds, same_recipe, seconds
from flows.plan.machine import Memory
from tasks.runtime.step import hardware

CARD = Memory(64.0, 24.0)
NOW = {"train/mine": 2000.0, "evaluate/base": 500.0, "evaluate/gptq-w4-g128": 500.0}


def run(home: Path, name: str, *, gib: float | None, device: str = "cuda", **steps: tuple[float, float]) -> None:
    """A run's folder as the pipeline leaves it, as far as it is read; of each step tokens and seconds."""
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    predicted: dict[str, Any] = {}
    for stage, (tokens, took) in steps.items():
        key = f"{stage}/{'earlier' if stage == 'train' else 'base'}"
        path = f"store/{key}-{name}"
        records.append({"key": key, "stage": stage, "path": path})
        predicted[key] = {"tokens": tokens}
        (home / path).mkdir(parents=True)
        (home / path / "manifest.json").write_text(json.dumps({"seconds": took, "execution": {"device": device}}))
    base = {"path": "/models/8b", "source": "org/8b@0123abc"}
    (folder / "steps.json").write_text(json.dumps({"base": base, "steps": records}))
    (folder / "preflight.json").write_text(json.dumps({"gpu_total_gib": gib, "steps": predicted}))


def test_earlier_runs_on_such_a_gpu_are_scaled_by_tokens(tmp_path: Path):
    run(tmp_path, "a", gib=23.6, train=(1000, 100), evaluate=(250, 20))
    run(tmp_path, "b", gib=24.0, train=(1000, 300))
    found = seconds(tmp_path, base="/models/8b", memory=CARD, tokens=NOW)
    assert found == {"train/mine": Seconds(400.0, 2), "evaluate/base": Seconds(40.0, 1)}  # no GPTQ arm was scored yet
    assert seconds(tmp_path, base="org/8b", memory=CARD, tokens=NOW) == found


@pytest.mark.parametrize(
    ("base", "gib", "device"),
    [
        ("/models/14b", 24.0, "cuda"),
        ("/models/8b", 80.0, "cuda"),
        ("/models/8b", None, "cpu"),
        ("/models/8b", 24.0, "cpu"),
    ],
)
def test_another_base_another_card_or_a_cpu_say_nothing(base: str, gib: float | None, device: str, tmp_path: Path):
    run(tmp_path, "a", gib=gib, device=device, train=(1000, 100))
    assert seconds(tmp_path, base=base, memory=CARD, tokens=NOW) == {}


def test_a_home_that_is_not_there_says_nothing(tmp_path: Path):
    assert seconds(tmp_path / "none", base="/models/8b", memory=CARD, tokens=NOW) == {}


def test_a_run_that_was_ended_early_is_passed_over(tmp_path: Path):
    run(tmp_path, "a", gib=24.0, train=(1000, 100))
    (tmp_path / "runs" / "cut").mkdir()
    (tmp_path / "runs" / "cut" / "steps.json").write_text("{")
    assert seconds(tmp_path, base="/models/8b", memory=CARD, tokens=NOW)["train/mine"].n == 1


def test_earlier_runs_of_the_same_recipe_and_machine_count_the_latest_first(tmp_path: Path) -> None:
    def write(run: str, seconds: float, status: str = "made", **other: Any) -> None:
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        step = {"key": "train/a", "status": status, "seconds": seconds}
        raw = {"schema": 1, "name": "mine", "hardware": hardware(), "steps": [step], **other}
        (folder / "steps.json").write_text(json.dumps(raw))

    assert same_recipe(tmp_path, "mine") == {}
    write("20260101-000000-mine-aaaa", 10.0)
    write("20260102-000000-mine-aaaa", 20.0)
    write("20260103-000000-mine-aaaa", 0.0, status="hit")
    write("20260104-000000-yours-aaaa", 30.0, name="yours")
    write("20260105-000000-mine-aaaa", 40.0, hardware={**hardware(), "cores": 999})
    write("20260106-000000-mine-aaaa", 50.0, schema=999)
    assert same_recipe(tmp_path, "mine") == {"train/a": 20.0}
