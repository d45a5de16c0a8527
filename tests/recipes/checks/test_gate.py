"""A test set that is too small for the gate is warned of before training; promote.prefer names what can be promoted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flows.gate.checks import PlannedCheck, judge
from flows.results.cells import Draws
from flows.results.rows import RowScores
from recipes.checks.check import check, load_and_read
from recipes.checks.gate import CHANGED, enough_rows, half_width
from recipes.read.load import load
from tests.conftest import QUICKSTART

PREFER = "promote.prefer=gptq-w4-g128"


def project(folder: Path, rows: int, *, text: bool = False, group: int = 1) -> Path:
    """A recipe with so many rows, `group` of them in one group, and the quickstart's base."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(rows):
        turns = [{"role": "user", "content": f"what is {i} ?"}, {"role": "assistant", "content": f"it is {i * 7}"}]
        lines.append({"text": f"number {i}"} if text else {"messages": turns, "set": f"g{i // group}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(
        f"name: small\nmodel: {{base: {QUICKSTART / 'base'}}}\n"
        f"data: {{path: rows.jsonl{', group: set' if not text else ''}, test: 0.4}}\n"
        "calibrate: {rows: 128, seq_len: 128}\n"
        "quantize: {schemes: [gptq-w4-g128, rtn-w4-g128]}\n"
    )
    return folder / "recipe.yaml"


def test_few_rows_of_test_are_warned_of_with_the_number_that_would_do(tmp_path: Path) -> None:
    warned, _ = load_and_read(project(tmp_path, 900)).rows.warnings
    assert warned.what.startswith("The gate can hardly pass: test has 3")
    assert "about 481 rows fall on test (data.test is 0.4)" in warned.next and "gate.task" in warned.where
    assert load_and_read(project(tmp_path, 900), sets=["gate.task=0.05", PREFER]).rows.warnings == ()
    assert load_and_read(project(tmp_path, 1400), sets=[PREFER]).rows.warnings == ()


def test_few_rows_of_dev_are_warned_of_unless_the_recipe_names_the_arm(tmp_path: Path) -> None:
    (warned,) = load_and_read(project(tmp_path, 1400)).rows.warnings
    assert warned.what.startswith("No scheme can be named for promotion: dev has 1")
    assert "about 186 rows fall on dev (data.dev is 0.1)" in warned.next and "promote.prefer" in warned.next
    assert load_and_read(project(tmp_path, 1400), sets=["data.dev=0.2"]).rows.warnings == ()


def test_rows_in_few_groups_are_too_few(tmp_path: Path) -> None:
    (warned,) = load_and_read(project(tmp_path, 1400, group=5), sets=[PREFER]).rows.warnings
    assert " in 1" in warned.what.partition("rows")[2]  # some 110 groups: 3.7 / 110 is more than 2 points
    assert "about 9" in warned.next  # 185 groups of five


def test_plain_texts_have_no_task_score_to_be_too_few_for(tmp_path: Path) -> None:
    assert load_and_read(project(tmp_path, 300, text=True)).rows.warnings == ()


@pytest.mark.parametrize("changed", [0.0, CHANGED])
def test_the_promised_width_is_that_of_the_gate(changed: float) -> None:
    """500 rows, as many answers turned right as wrong."""
    rows = 500
    turned = round(rows * changed / 2)
    a, b = np.ones(rows), np.ones(rows)
    a[:turned], b[turned : 2 * turned] = 0, 0
    names = np.asarray([f"{i:04d}" for i in range(rows)])
    one, other = (RowScores(names, names, np.full(rows, ""), score, np.ones(rows)) for score in (a, b))
    planned = PlannedCheck(metric="task", source="task", against="other", margin=0.02, a=one, b=other)
    (check,) = judge([planned], Draws())
    assert check.ci95 is not None
    promised = half_width(rows, rows) if changed else 3.7 / rows
    assert check.ci95.high == pytest.approx(promised, rel=0.03)


def test_enough_rows_are_enough_and_one_less_is_not() -> None:
    for margin, each in ((0.02, 1.0), (0.05, 1.0), (0.02, 5.0)):
        enough = enough_rows(margin, each=each)
        assert half_width(enough, round(enough / each + 0.5)) < margin
        assert half_width(enough - 1, int((enough - 1) / each)) >= margin


@pytest.mark.parametrize("slug", ["nf4-adapter", "base", "gptq-w4-g32", "merged-nothing"])
def test_what_cannot_be_promoted_is_no_preference(tmp_path: Path, slug: str) -> None:
    path = project(tmp_path, 900)
    (problem,) = check(load(path, sets=[f"promote.prefer={slug}"]))
    assert slug in problem.what and "gptq-w4-g128, rtn-w4-g128" in problem.next
    assert check(load(path, sets=["promote.prefer=rtn-w4-g128"])) == []
    assert check(load(path, sets=["promote.prefer=merged-original"])) == []
