"""What is said of the time that is left: by earlier runs, by this one's own steps, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.report.console import TextConsole
from flows.run import remaining
from flows.run.progress import Display
from flows.run.remaining import Remaining

KEYS = ("train/a", "evaluate/x", "evaluate/y")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that passes for Remaining: set by the test."""
    now = [0.0]
    monkeypatch.setattr(remaining.time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_said_as_long_as_a_step_is_unknown(clock: list[float]) -> None:
    left = Remaining(KEYS, {"train/a": 100.0, "evaluate/x": 20.0})
    assert left.seconds() is None
    clock[0] = 100.0
    left.ended("train/a", 100.0)
    assert left.seconds() is None and left.steps == 2
    clock[0] = 130.0
    left.ended("evaluate/x", 30.0)
    assert left.seconds() == 30.0  # as long as the other one of its stage took in this run


def test_what_ran_at_the_same_time_will_do_so_further_on(clock: list[float]) -> None:
    left = Remaining(KEYS, dict.fromkeys(KEYS, 60.0))
    assert left.seconds() == 180.0
    clock[0] = 30.0
    left.ended("train/a", 60.0)  # twice as much work as time
    assert left.seconds() == 60.0
    left.ended("evaluate/x", None)  # failed
    left.ended("evaluate/z", 10.0)  # not of the plan
    assert left.seconds() == 30.0 and left.steps == 1


def test_a_terminal_shows_what_runs_what_waits_and_the_time_that_is_left(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        display = Display(TextConsole(file=out, force_terminal=True, width=200, color_system=None))
        with display:
            display.expect(KEYS, dict.fromkeys(KEYS, 200.0))
            display.started("train/a")
            display.ended("train/a", "made  train/a", seconds=200.0)
            display.started("evaluate/x")
    text = (tmp_path / "out").read_text()
    assert "the whole run" in text and "1/3" in text and "1 running, 1 waiting" in text
    assert "left" in text


def test_without_a_terminal_there_are_only_lines(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        display = Display(TextConsole(file=out, width=200))
        with display:
            display.expect(KEYS, {})
            display.started("train/a")
            display.event("train/a", {"kind": "progress", "done": 1, "total": 2, "unit": "step", "note": ""})
            display.ended("train/a", "made  train/a", seconds=1.0)
    assert (tmp_path / "out").read_text().splitlines() == ["made  train/a"]
