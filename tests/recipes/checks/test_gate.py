"""A test set that is too small for the gate is warned of before training; promote.prefer names what can be promoted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flows.gate.checks import PlannedCheck, judge
from flows.results.cells import Draws
from flows.results.rows import RowScores
from recipes.checks.check import check, check_data, load_and_read
from recipes.checks.gate import document_problem
from recipes.checks.power import GUESSED, Rate, Scored, enough_rows, half_width
from recipes.checks.rows import warnings_at
from recipes.data.rows import side
from recipes.problem import Problem
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
    assert "Where 5 % of the answers change (a guess), a candidate that is truly equal passes 31 % of" in warned.why
    assert "about 1,118 rows fall on test (2,800 in all, while data.test is 0.4)" in warned.next
    assert "gate.task" in warned.where and "passes 4 times in 5" in warned.next
    assert load_and_read(project(tmp_path, 900), sets=["gate.task=0.05", PREFER]).rows.warnings == ()
    assert load_and_read(project(tmp_path, 1800), sets=[PREFER]).rows.warnings == ()


def test_few_rows_of_dev_are_warned_of_unless_the_recipe_names_the_arm(tmp_path: Path) -> None:
    (warned,) = load_and_read(project(tmp_path, 1800)).rows.warnings
    assert warned.what.startswith("No scheme can be named for promotion: dev has 1")
    assert "about 238 rows fall on dev (2,400 in all, while data.dev is 0.1)" in warned.next
    assert "gate.task to 0.0" in warned.next and "promote.prefer" in warned.next
    assert load_and_read(project(tmp_path, 1800), sets=["data.dev=0.2"]).rows.warnings == ()


def test_rows_in_few_groups_are_too_few(tmp_path: Path) -> None:
    (warned,) = load_and_read(project(tmp_path, 1800, group=5), sets=[PREFER]).rows.warnings
    assert warned.what.startswith("The gate cannot pass: test has 8") and " rows in 1" in warned.what
    assert "Even where no answer changes" in warned.why  # some 160 groups: 3.7 / 160 is more than 2 points
    assert "rows fall on test, in groups like these" in warned.next


def test_a_margin_that_lets_anything_pass_is_not_advised(tmp_path: Path) -> None:
    (warned,) = load_and_read(project(tmp_path, 200), sets=[PREFER, "data.test=0.1"]).rows.warnings
    assert "points to each side" in warned.why and "gate.task" not in warned.next


def grouped(folder: Path, groups: list[str], *, domains: list[str] | None = None) -> Path:
    """As `project`, a row for each name of a group."""
    path = project(folder, len(groups))
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for line, group, domain in zip(lines, groups, domains or groups, strict=True):
        line["set"], line["kind"] = group, domain
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def on_test(name: str, *, test: float = 0.4) -> bool:
    return side(name, salt="", dev=0.1, test=test) == "test"


def test_groups_below_five_of_equal_size_get_no_verdict(tmp_path: Path) -> None:
    """One conversation holds most of the rows of test: they count as little more than one."""
    names = [f"talk {i}" for i in range(300)]
    largest = next(name for name in names if on_test(name))
    rows = [name for name in names for _ in range(400 if name == largest else 1)]
    (warned,) = load_and_read(grouped(tmp_path, rows), sets=[PREFER]).rows.warnings
    held = sum(map(on_test, names))
    assert warned.what == (
        f"Nothing can be promoted: test has too few groups: {held}, which count as "
        f"{(held + 399) ** 2 / (held - 1 + 400**2):.1f} of equal size; 5 are needed."
    )
    assert "Rows with equal `set` are one group" in warned.why and "data.group" in warned.next
    assert f"the largest holds {40000 / (held + 399):.0f} % of the rows" in warned.why
    assert "238 for a margin of 2 points" in warned.next


def test_a_row_that_is_too_long_makes_no_split_lopsided(tmp_path: Path) -> None:
    """It is left out or cut: one row of a megabyte is not most of the tokens of test."""
    path = project(tmp_path, 1800)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    longest = next(line for line in lines if on_test(line["set"]))
    longest["messages"][1]["content"] = "long " * 200_000
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_and_read(path, sets=[PREFER]).rows.warnings == ()


def test_a_domain_that_gates_with_too_few_groups_is_warned_of(tmp_path: Path) -> None:
    """250 rows of a domain in one conversation: its check is undecided whatever the model does."""
    names = [f"talk {i}" for i in range(3000)]
    largest = next(name for name in names if on_test(name))
    rows = [name for name in names for _ in range(250 if name == largest else 1)]
    kinds = ["one" if name == largest else "many" for name in rows]
    path = grouped(tmp_path, rows, domains=kinds)
    sets = [PREFER, "data.domain=kind", "gate.task=0.2"]
    (warned,) = load_and_read(path, sets=sets).rows.warnings
    assert warned.what == "The gate cannot pass in the domain `one`: test has 250 rows in 1 group of it."
    assert "too few groups: one" in warned.why
    assert load_and_read(path, sets=sets[:1] + sets[2:]).rows.warnings == ()


def test_few_general_texts_are_warned_of(tmp_path: Path) -> None:
    path = project(tmp_path, 1800)
    sets = [PREFER, "data.general=general.jsonl"]
    for count, words in ((4, "too few groups: 4; 5 are needed"), (5, "")):
        (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(count)))
        assert [one.what for one in load_and_read(path, sets=sets).rows.warnings] == (
            [f"Nothing can be promoted: data.general has {words}."] if words else []
        )


def test_an_earlier_run_takes_the_place_of_the_guess(tmp_path: Path) -> None:
    """Fewer answers change than was guessed: the gate can pass. What else was warned of stays."""
    loaded = load(project(tmp_path, 900), sets=[PREFER])
    rows = check_data(loaded)
    another = Problem(what="Another warning.", where="here", why="so", next="that")
    rows = rows._replace(answers=(another,))
    assert len(rows.warnings) == 2
    assert warnings_at(loaded, rows, Rate(0.02, 0.02, "as in run r")) == (another,)
    kept, hardly = warnings_at(loaded, rows, Rate(0.1, 0.1, "as in run r"))
    assert kept == another and hardly.why.startswith("Where 10 % of the answers change (as in run r)")


def test_plain_texts_have_no_task_score_to_be_too_few_for(tmp_path: Path) -> None:
    assert load_and_read(project(tmp_path, 300, text=True)).rows.warnings == ()


@pytest.mark.parametrize("changed", [0.0, GUESSED])
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
    assert check.ci95.high == pytest.approx(half_width(Scored.apart(rows), changed), rel=0.03)


# ---- documents of lm-eval tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
tag: [both]
"""


def quizzes(folder: Path, scorer: str, **documents: int) -> Path:
    """A recipe with an lm-eval entry, and tasks of one's own with so many documents."""
    path = project(folder, 1800)
    (folder / "mine").mkdir(exist_ok=True)
    for name, count in documents.items():
        (folder / "mine" / f"{name}.yaml").write_text(TASK.format(name=name))
        (folder / "mine" / f"{name}.jsonl").write_text("".join(f'{{"q": {i}}}\n' for i in range(count)))
    path.write_text(path.read_text() + f"evaluate: {{scorers: [{{kind: exact-match}}, {{kind: lm-eval, {scorer}}}]}}\n")
    return path


@pytest.mark.parametrize(
    ("scorer", "documents", "most"),
    [
        ("tasks: [sky], include: mine", {"sky": 60}, 60),
        ("tasks: [sky, sea], include: mine", {"sky": 60, "sea": 30}, 90),
        ("tasks: [both], include: mine", {"sky": 60, "sea": 30}, 90),  # a tag
        ("tasks: [sky, sea], include: mine, limit: 40", {"sky": 60, "sea": 30}, 70),
        ("tasks: [sky, sea], include: mine", {"sky": 300, "sea": 30}, None),
        ("tasks: [gsm8k], limit: 100", {}, 100),  # its documents are on a hub; the limit is known
        ("tasks: [gsm8k]", {}, None),
        ("tasks: [mmlu], limit: 10", {}, None),  # a group of 57 tasks
    ],
)
def test_few_documents_are_warned_of_where_they_can_be_counted(
    tmp_path: Path, scorer: str, documents: dict[str, int], most: int | None
) -> None:
    warnings = check_data(load(quizzes(tmp_path, scorer, **documents), sets=[PREFER])).warnings
    assert [one.what for one in warnings] == (
        [f"The gate cannot pass: task.lm-eval has {most} documents."] if most else []
    )
    assert all("ask 238 documents or more" in one.next and "scorers.1.tasks" in one.where for one in warnings)


def test_one_document_more_than_too_few_can_pass() -> None:
    enough = next(n for n in range(1, 1000) if document_problem("task.x", n, 0.02, where="here") is None)
    assert enough == enough_rows(0.02, 0.0) == 238
    problem = document_problem("task.x", enough - 1, 0.02, where="here")
    assert problem is not None and "reaches 2.0 points to each side" in problem.why
    none = document_problem("task.x", 500, 1e-9, where="here")
    assert none is not None and "ask more than ten million documents" in none.next
    few = document_problem("task.x", 3, 0.9, where="here")
    assert few is not None and "too few groups: 3; 5 are needed" in few.why


@pytest.mark.parametrize("slug", ["nf4-adapter", "base", "gptq-w4-g32", "merged-nothing"])
def test_what_cannot_be_promoted_is_no_preference(tmp_path: Path, slug: str) -> None:
    path = project(tmp_path, 900)
    (problem,) = check(load(path, sets=[f"promote.prefer={slug}"]))
    assert slug in problem.what and "gptq-w4-g128, rtn-w4-g128" in problem.next
    assert check(load(path, sets=["promote.prefer=rtn-w4-g128"])) == []
    assert check(load(path, sets=["promote.prefer=merged-original"])) == []
