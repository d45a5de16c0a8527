"""`evaluate.scorers` before anything runs: files, functions and task names are looked at, nobody's code is imported."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from recipes.checks.check import check, check_data
from recipes.checks.lm_eval_tasks import built_in, find_tasks
from recipes.checks.python import VARIABLE
from recipes.problem import Problem, RecipeError
from recipes.read.load import load
from recipes.scorers import PythonCallableSpec
from tests.recipes.folders import chat, write_project, write_rows

CALLABLE = "{kind: python, callable: 'own/score.py:score'}"


@pytest.fixture(autouse=True)
def own_python_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{tmp_path}{os.pathsep}json{os.pathsep}posixpath")


def recipe(folder: Path, *scorers: str) -> Path:
    return write_project(folder, extra=f"evaluate:\n  scorers: [{', '.join(scorers)}]\n")


def problems(path: Path) -> list[Problem]:
    return check(load(path))


def only(path: Path) -> Problem:
    (problem,) = problems(path)
    return problem


@pytest.mark.parametrize(
    ("scorers", "words"),
    [
        (["{kind: exact-match}", "{kind: exact-match}"], "exact-match twice"),
        (["{kind: number, name: exact-match}", "{kind: exact-match}"], "exact-match twice"),
        (["{kind: lm-eval, tasks: [piqa]}"], "begins with lm-eval"),
        (["{kind: python, callable: score.py}"], "module:function"),
        (["{kind: lm-eval, tasks: []}"], "a list of 1 or more"),
        (["{kind: exact-match, name: Exact}"], "40 small letters"),
        ([], "a list of 1 or more"),
        (["{kind: json-schema}"], "schema_file` is missing"),
    ],
)
def test_what_the_schema_refuses(tmp_path: Path, scorers: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(recipe(tmp_path, *scorers))
    (problem,) = refused.value.problems
    assert words in str(problem) and "recipe.yaml:10 evaluate.scorers" in problem.where


def test_the_first_is_task_and_names_default_to_kinds(tmp_path: Path) -> None:
    scorers = load(recipe(tmp_path, "{kind: number, name: total}", "{kind: exact-match}")).recipe.evaluate.scorers
    assert [scorer.called for scorer in scorers] == ["total", "exact-match"]


# ---- a function


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "own/score.py"),
        ("def score(answer, reference, columns: return 1", "no Python that can be read"),
        ("def scored(answer, reference, columns): return 1", "It defines scored"),
        ("def score(answer, reference): return 1", "cannot be called with answer, reference, columns"),
        ("def score(a, b, c, d): return 1", "cannot be called"),
        ("def score(a, b, c, *, d): return 1", "cannot be called"),
        ("async def score(a, b, c): return 1", "cannot be called"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(tmp_path: Path, code: str | None, words: str) -> None:
    path = recipe(tmp_path, CALLABLE)
    (tmp_path / "own").mkdir()
    if code is not None:
        (tmp_path / "own" / "score.py").write_text(code)
    assert words in str(only(path))


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit('imported')\ndef score(answer, reference, columns): return 1",
        "def score(a, b, c, d=1, *more, e=2): return 1",
        "def score(*all): return 1",
        "from math import isclose as score",
        "score = lambda a, b, c: 1",
        "class score: pass",
    ],
)
def test_a_function_is_found_without_importing_anything(tmp_path: Path, code: str) -> None:
    path = recipe(tmp_path, CALLABLE)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "score.py").write_text(code)
    assert problems(path) == []
    assert "score" not in sys.modules


def test_a_module_is_found_below_the_recipe_and_among_installed_ones(tmp_path: Path) -> None:
    own = tmp_path / "judges" / "strict.py"
    own.parent.mkdir()
    own.write_text("def score(a, b, c): return a == b\n")
    loaded = load(recipe(tmp_path, "{kind: python, callable: 'judges.strict:score'}"))
    assert check(loaded) == []
    assert loaded.content(loaded.recipe.evaluate.scorers[0]) == own
    installed = PythonCallableSpec(kind="python", callable="jsonschema.validators:validate")
    assert str(loaded.content(installed)).endswith("jsonschema/validators.py")
    assert "jsonschema.validators" not in sys.modules or Path(str(loaded.content(installed))).is_file()
    assert "no_such_module.py" in only(recipe(tmp_path, "{kind: python, callable: 'no_such_module:score'}")).what


def test_paths_of_scorers_count_from_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "shared" / "own").mkdir(parents=True)
    (tmp_path / "shared" / "own" / "score.py").write_text("def score(a, b, c): return 1\n")
    (tmp_path / "shared" / "answer.json").write_text("{}")
    write_project(tmp_path, extra="extends: shared/scorers.yaml\n")
    (tmp_path / "shared" / "scorers.yaml").write_text(
        f"evaluate:\n  scorers:\n    - {CALLABLE}\n    - {{kind: json-schema, schema_file: answer.json}}\n"
    )
    loaded = load(tmp_path / "recipe.yaml")
    assert check(loaded) == []
    own, schema = loaded.recipe.evaluate.scorers
    assert own.path == "shared/own/score.py:score" and schema.path == "shared/answer.json"


# ---- a JSON schema


def test_a_schema_file_is_read(tmp_path: Path) -> None:
    path = recipe(tmp_path, "{kind: json-schema, schema_file: answer.json}")
    assert "not there" in only(path).what
    for text in ("[1]", "{", "\\x"):
        (tmp_path / "answer.json").write_text(text)
        assert "is no JSON schema" in only(path).what
    (tmp_path / "answer.json").write_text(json.dumps({"type": "object"}))
    assert problems(path) == []


# ---- lm-evaluation-harness

EVAL = "{kind: exact-match}"


def test_names_of_tasks_are_found_without_importing_the_library(tmp_path: Path) -> None:
    tasks = find_tasks(["hellaswag", "mmlu", "ai2_arc", "hellaswog", "zzzzzz"], None)
    assert set(tasks.files) == {"hellaswag", "mmlu", "ai2_arc"}  # a task, a group, a tag
    assert all(built_in() in path.parents for paths in tasks.files.values() for path in paths)
    assert tasks.near == {"hellaswog": "hellaswag", "zzzzzz": ""}


def test_a_task_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    problem = only(recipe(tmp_path, EVAL, "{kind: lm-eval, tasks: [piqa, helaswag]}"))
    assert "no task `helaswag`" in problem.what and problem.next == "Did you mean `hellaswag`?"
    assert problem.where.endswith("evaluate.scorers.1.tasks")


def test_tasks_of_ones_own(tmp_path: Path) -> None:
    path = recipe(tmp_path, EVAL, "{kind: lm-eval, tasks: [sky, heaven], include: mine}")
    assert "mine" in only(path).what
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sky.yaml").write_text("task: sky\ntag: [heaven]\ndoc_to_text: !function utils.text\n")
    assert problems(path) == []
    assert find_tasks(["sky"], tmp_path / "mine").files["sky"] == [tmp_path / "mine" / "sky.yaml"]


# ---- rows


def test_rows_of_dev_and_test_have_an_answer(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    rows = [chat(number) for number in range(260)]
    for row in rows:
        row["messages"][-1]["content"] = f"<think>hm</think>\n{row['messages'][-1]['content']}"
    write_rows(tmp_path / "rows.jsonl", rows)
    assert check_data(load(path)).problems == []
    for unanswered in ("<think>hm</think>\n", "<think>\nit may be so, or"):
        for row in rows:
            row["messages"][-1]["content"] = unanswered
        write_rows(tmp_path / "rows.jsonl", rows)
        summary = check_data(load(path)).summary
        (problem,) = check_data(load(path)).problems
        held_out = summary["dev"]["rows"] + summary["test"]["rows"]
        assert problem.what == f"{held_out} rows of dev and test have no reference answer."
        assert problem.where.startswith("rows.jsonl:")


def test_answers_that_seem_longer_than_the_limit_are_warned_of(tmp_path: Path) -> None:
    """By bytes: thinking counts; what whole rows may not be is no limit to warn of."""
    path = write_project(tmp_path, extra="evaluate:\n  max_new_tokens: 20\n")

    def warned() -> list[Problem]:
        return [one for one in check_data(load(path)).warnings if one.where.endswith("evaluate.max_new_tokens")]

    assert warned() == []
    rows = [chat(number) for number in range(260)]
    for row in rows:
        row["messages"][-1]["reasoning_content"] = "word " * 30
    write_rows(tmp_path / "rows.jsonl", rows)
    (warning,) = warned()
    held_out = [check_data(load(path)).summary[side]["rows"] for side in ("dev", "test")]
    assert warning.what.startswith("Reference answers of dev and test have more than 20 tokens")
    assert warning.what.endswith(f": {sum(held_out)}.")
    enough = int(warning.next.split(" to ")[1].split()[0])
    assert 20 < (150 + 20) / 4 < enough < 128
    for limit in (enough, 128):
        path.write_text(path.read_text().split("evaluate:")[0] + f"evaluate:\n  max_new_tokens: {limit}\n")
        assert warned() == []
