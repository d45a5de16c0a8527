"""Too few groups of rows, or too lopsided ones: figures without interval, no verdict, and the number in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.gate.checks import PlannedCheck, judge
from flows.report.build import render
from flows.results.cells import Draws, rows_cell
from flows.results.metrics import METRICS
from flows.results.paired import Paired, few_groups, paired
from flows.results.rows import RowScores, TokenKL
from tests.flows.synthetic_run import SHAPES, SyntheticRun

SOME = {slug: SHAPES[slug] for slug in ("base", "nf4-adapter", "merged-dequantized", "merged-original", "gptq-w4-g128")}


def grouped(rows_of_groups: list[int], *, tokens: float = 1.0) -> RowScores:
    """So many rows in each group; all right, so that a score is 1."""
    group = np.repeat([f"g{index:03d}" for index in range(len(rows_of_groups))], rows_of_groups)
    names = np.asarray([f"{index:05d}" for index in range(len(group))])
    count = np.full(len(group), tokens)
    return RowScores(names, group, np.full(len(group), ""), count * np.linspace(0.5, 1, len(group)), count)


LOPSIDED = [190, *[10] * 19]  # 20 groups, one of them with half of all rows


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([40], "too few groups: one, so nothing can be said about the spread"),
        ([40, 40], "too few groups: 2; 5 are needed"),
        ([30, 30, 30], "too few groups: 3; 5 are needed"),
        ([100, 10, 10, 10, 10], "too few groups: 5, which count as 1.9 of equal size; 5 are needed"),
        (LOPSIDED, "too few groups: 20, which count as 3.8 of equal size; 5 are needed"),
    ],
)
def test_no_pair_of_so_few_is_compared_and_the_number_is_said(sizes: list[int], words: str) -> None:
    rows = grouped(sizes)
    assert few_groups(rows) == words
    assert paired(rows, rows) == ("one group" if len(sizes) == 1 else "few groups")
    planned = PlannedCheck(metric="task", source="task", against="champion", margin=0.02, a=rows, b=rows)
    (check,) = judge([planned], Draws())
    assert (check.outcome, check.ci95) == ("undecided", None)
    assert check.as_dict()["text"] == f"task against champion: undecided, {words}"


@pytest.mark.parametrize("sizes", [[3] * 5, [30, *[4] * 25], [1] * 100])
def test_five_of_equal_size_are_enough(sizes: list[int]) -> None:
    rows = grouped(sizes)
    assert few_groups(rows) is None
    assert isinstance(paired(rows, rows), Paired)


@pytest.mark.parametrize("metric", ["task", "ppl_test", "kl_mean", "top1_agreement"])
def test_a_cell_keeps_its_figure_and_says_why_it_has_no_interval(metric: str) -> None:
    few = rows_cell(METRICS[metric], grouped(LOPSIDED, tokens=7.0), None, Draws())
    assert few.value is not None and few.ci95 is None
    assert few.reason == "too few groups: 20, which count as 3.8 of equal size; 5 are needed"
    enough = rows_cell(METRICS[metric], grouped([10] * 20, tokens=7.0), None, Draws())
    assert enough.ci95 is not None and enough.reason is None


def test_a_tail_of_lopsided_tokens_has_none_either() -> None:
    group = np.repeat(np.arange(20), LOPSIDED)
    kl = TokenKL(np.random.default_rng(0).gamma(1, 1, len(group)), group, tuple(f"g{index:02d}" for index in range(20)))
    few = rows_cell(METRICS["kl_p99"], grouped(LOPSIDED), kl, Draws())
    assert few.value is not None and few.ci95 is None and "20, which count as 3.8" in str(few.reason)
    even = replace(kl, group=np.arange(len(group)) % 20)
    assert rows_cell(METRICS["kl_p99"], grouped(LOPSIDED), even, Draws()).ci95 is not None


def test_the_report_of_few_groups_gives_no_verdict_anywhere_and_says_so(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path, test=8, general=40, measured=False, shapes=SOME).write()
    report = json.loads(json.dumps(render(folder, tmp_path).json))
    groups = report["data"]["test"]["groups"]
    assert 2 <= groups < 5
    assert {one["metric"] for one in report["comparisons"]} <= {"ppl_general"}  # each text of it is a group
    reasons = {one["reason"] for one in report["comparisons_left_out"]}
    assert reasons and all(reason.startswith(f"too few groups: {groups}") for reason in reasons)
    assert report["gate"]["outcome"] in ("undecided", "none")
    assert all("too few groups" in line for line in report["verdict"])
    arm = report["arms"]["gptq-w4-g128"]["metrics"]
    assert (
        arm["task"]["value"] is not None and arm["task"]["ci95"] is None and "too few groups" in arm["task"]["reason"]
    )
    assert (
        "too few groups" in (folder / "report.md").read_text()
        and "too few groups" in (folder / "report.html").read_text()
    )
    assert report["kept"]["task"]["gain"] is None and "too few groups" in report["kept"]["task"]["reason"]
