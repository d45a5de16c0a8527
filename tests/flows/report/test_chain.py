"""The chain of versions in words, in a table and as a figure."""

from __future__ import annotations

from typing import Any

import pytest

from flows.gate.checks import BEST, Check
from flows.report.chain import SHOWN, chain_lines, left_away, margin_of
from flows.report.plots.chain import chain_plot
from flows.results.stats import Interval


def version(number: int, difference: float | None, reason: str | None = None) -> dict[str, Any]:
    ci95 = None if difference is None or number == 1 else [difference - 0.01, difference + 0.01]
    told = {"version": number, "at": f"2026-01-{number % 28 + 1:02d}T12:00:00+00:00", "run": f"run-{number}"}
    return {**told, "arm": "gptq-w4-g128", "difference": difference, "ci95": ci95, "n": 700, "reason": reason}


def gate(versions: list[dict[str, Any]], *, best: int = 1, champion: int = 2) -> dict[str, Any]:
    check = Check(
        metric="task",
        against=BEST if best != champion else "champion",
        margin=0.02,
        unit="share",
        outcome="undecided",
        difference=-0.015,
        ci95=Interval(-0.03, 0.0),
        level=0.999,
        ci_level=Interval(-0.04, 0.01),
    )
    chain = {"metric": "task", "best": best, "champion": champion, "versions": versions, "left_out": []}
    return {"candidate": "awq-w4-g128", "tests": [check.as_dict()], "chain": chain}


def test_versions_and_candidate_in_words() -> None:
    made = gate([version(1, 0.0), version(2, -0.012), version(3, None, "no row of test in common with the best")])
    lines = chain_lines(made)
    assert [(line.name, line.at, line.text) for line in lines] == [
        ("1 (best)", "2026-01-02", "–"),
        ("2 (champion)", "2026-01-03", "−1.2 [−2.2, −0.2] points"),
        ("3", "2026-01-04", "no row of test in common with the best"),
        ("candidate", "", "−1.5 [−4.0, +1.0] points at 99.9 %"),
    ]
    margin = margin_of(made)
    assert margin is not None and margin == pytest.approx((-0.02, "2 points"))
    svg = chain_plot(made)
    assert svg.startswith("<svg") and svg.count("1 (best)") == 1 and "candidate" in svg and ">3<" not in svg


def test_of_a_long_chain_the_last_half_year_and_the_best_are_shown() -> None:
    made = gate([version(number, -0.001 * number) for number in range(1, 53)], champion=52)
    lines = chain_lines(made)
    assert len(lines) == SHOWN + 2 and lines[0].name == "1 (best)" and lines[1].name == str(53 - SHOWN)
    assert left_away(made) == 52 - SHOWN - 1


def test_where_the_champion_is_the_best_the_candidate_stands_against_it() -> None:
    made = gate([version(1, 0.0)], best=1, champion=1)
    assert [line.name for line in chain_lines(made)] == ["1 (best, champion)", "candidate"]


@pytest.mark.parametrize("made", [None, {"chain": None, "tests": []}, gate([])])
def test_without_versions_there_is_nothing(made: dict[str, Any] | None) -> None:
    assert chain_lines(made) == [] and chain_plot(made) == "" and left_away(made) == 0
