"""Python that a recipe names: refused until whoever starts the run allows that file, folder or package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recipes.checks.check import check, check_base, load_and_check
from recipes.checks.python import VARIABLE, allow, named_python
from recipes.problem import Problem, RecipeError
from recipes.read.load import load
from tests.recipes.folders import write_base, write_project

SCORE = "def score(answer, reference, columns):\n    return 1\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CUSTOM = {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "modeling.Strange"}}


@pytest.fixture(autouse=True)
def nothing_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


def project(folder: Path, scorer: str) -> Path:
    path = write_project(folder, extra=f"evaluate:\n  scorers: [{{kind: exact-match}}, {scorer}]\n")
    (folder / "own").mkdir()
    (folder / "own" / "score.py").write_text(SCORE)
    return path


def problems(path: Path) -> list[Problem]:
    return check(load(path))


@pytest.mark.parametrize("scorer", ["{kind: python, callable: 'own/score.py:score'}"])
def test_a_file_beside_the_recipe_is_refused_until_it_or_its_folder_is_allowed(tmp_path: Path, scorer: str) -> None:
    path = project(tmp_path, scorer)
    (problem,) = problems(path)
    assert "own/score.py:score" in problem.what and "recipe.yaml:10 evaluate.scorers.1.callable" in problem.where
    assert f"--allow-python {tmp_path / 'own' / 'score.py'}" in problem.next and VARIABLE in problem.next
    for entry in (tmp_path / "own" / "score.py", tmp_path / "own", tmp_path):
        os.environ[VARIABLE] = str(entry)
        assert not problems(path)
        (code,) = named_python(load(path))
        assert code.allowed == str(entry)
    for entry in (tmp_path / "ow", tmp_path / "own" / "score", tmp_path / "own" / "other.py", "own", "score"):
        os.environ[VARIABLE] = str(entry)
        assert problems(path)


def test_a_link_out_of_an_allowed_folder_and_a_way_up_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(SCORE)
    inside = tmp_path / "inside"
    path = project(inside, "{kind: python, callable: 'own/../../elsewhere.py:score'}")
    (inside / "own" / "link.py").symlink_to(tmp_path / "elsewhere.py")
    linked = path.with_name("linked.yaml")
    linked.write_text(path.read_text().replace("own/../../elsewhere.py", "own/link.py"))
    allow([str(inside)])
    for recipe in (path, linked):
        (problem,) = problems(recipe)
        assert "elsewhere.py" in problem.next
    allow([str(tmp_path / "elsewhere.py")])
    assert not problems(path) and not problems(linked)


@pytest.mark.parametrize(("source", "entry"), [("posixpath:join", "posixpath"), ("json.tool:main", "json")])
def test_a_module_is_allowed_by_its_package_and_stdlib_is_no_exception(tmp_path: Path, source: str, entry: str) -> None:
    path = project(tmp_path, f"{{kind: python, callable: '{source}'}}")
    assert [problem for problem in problems(path) if f"--allow-python {entry}," in problem.next]
    allow([entry])
    assert not [problem for problem in problems(path) if "allowed" in problem.what]


def test_a_packages_name_allows_no_file_of_the_recipes_folder_with_that_name(tmp_path: Path) -> None:
    path = project(tmp_path, "{kind: python, callable: 'statistics:score'}")
    (tmp_path / "statistics.py").write_text(SCORE)
    allow(["statistics"])
    (problem,) = problems(path)
    assert str(tmp_path / "statistics.py") in problem.next


def test_a_folder_of_lm_eval_tasks_counts_as_python(tmp_path: Path) -> None:
    path = project(tmp_path, "{kind: lm-eval, name: quiz, tasks: [quiz], include: quizzes}")
    (tmp_path / "quizzes").mkdir()
    (tmp_path / "quizzes" / "quiz.yaml").write_text("task: quiz\ndoc_to_text: !function own.text\n")
    (problem,) = problems(path)
    assert "quizzes" in problem.what
    allow([str(tmp_path / "quizzes")])
    assert not problems(path)


ELSEWHERE = {
    "include: ../shared.yaml": ":2",
    "include: [base.yaml, /FOLDER/shared.yaml]": ":2",
    "doc_to_text: !function ...FOLDER.shared.text": "",  # dots become slashes: an absolute path
    "x: {y: [1, include: ../shared.yaml]}": ":2",
    "process_docs: !function link.text": "link.py",
    "include: inner.txt": "inner.txt",  # which has any name
}


@pytest.mark.parametrize("line", ELSEWHERE)
def test_what_lies_outside_of_an_allowed_folder_is_not_reached_from_it(tmp_path: Path, line: str) -> None:
    path = project(tmp_path, "{kind: lm-eval, name: quiz, tasks: [quiz], include: quizzes}")
    (tmp_path / "quizzes").mkdir()
    (tmp_path / "shared.yaml").write_text("doc_to_text: !function shared.text\n")
    (tmp_path / "shared.py").write_text("print('run')\n")
    (tmp_path / "quizzes" / "base.yaml").write_text("doc_to_target: a\n")
    (tmp_path / "quizzes" / "own.py").write_text("text = str\n")
    quiz = tmp_path / "quizzes" / "quiz.yaml"
    allow([str(tmp_path / "quizzes")])
    quiz.write_text("task: quiz\ninclude: base.yaml\ndoc_to_text: !function own.text\nfilter: !function json.loads\n")
    assert not problems(path)
    (tmp_path / "quizzes" / "inner.txt").write_text("include: ../shared.yaml\n")
    if ELSEWHERE[line] == "link.py":
        (tmp_path / "quizzes" / "link.py").symlink_to(tmp_path / "shared.py")
    folder = str(tmp_path)
    line = line.replace("/FOLDER", folder).replace("..FOLDER", folder.replace("/", "."))
    quiz.write_text(f"task: quiz\n{line}\n")
    found = [problem for problem in problems(path) if "reaches out of itself" in problem.what]
    assert found and all(str(tmp_path / "shared") in problem.why for problem in found)


@pytest.mark.parametrize("task", ["FOLDER/evil.yaml", "FOLDER/*", "../evil", "*"])
def test_a_task_is_a_name_and_no_file(tmp_path: Path, task: str) -> None:
    """lm-eval itself would load a file that is named, and run its functions; nobody has allowed that."""
    (tmp_path / "evil.yaml").write_text("task: evil\ndoc_to_text: !function evil.text\n")
    task = task.replace("FOLDER", str(tmp_path))
    (problem,) = problems(project(tmp_path, f"{{kind: lm-eval, name: quiz, tasks: ['{task}']}}"))
    assert "has no task" in problem.what


def test_the_flag_reaches_check_and_a_relative_path_counts_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main

    path = project(tmp_path, "{kind: python, callable: 'own/score.py:score'}")
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(path)]) == 2 and "nobody has allowed" in capsys.readouterr().err
    assert main(["check", str(path), "--allow-python", "own"]) == 0
    assert os.environ[VARIABLE] == str(tmp_path / "own")


# ---- code that comes with a model


def refused(path: Path, *sets: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_and_check(path, sets=sets)
    return list(caught.value.problems)


def test_a_base_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    write_base(tmp_path / "base", config=CUSTOM)
    (problem,) = refused(path)
    assert "code of its own" in problem.what and "strange" in problem.why and "model.base" in problem.where
    assert check_base(load(path), write_base(tmp_path / "known", config=CUSTOM | {"model_type": "llama"})) == []


def test_an_external_models_code_runs_where_recipe_and_caller_say_so(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    folder = write_base(tmp_path / "custom", config=CUSTOM)
    (off,) = refused(path, f"evaluate.external.big={{path: {folder}}}")
    assert "code of its own" in off.what and "trust_remote_code: true" in off.next
    (alone,) = refused(path, f"evaluate.external.big={{path: {folder}, trust_remote_code: true}}")
    assert "nobody has allowed" in alone.what and f"--allow-python {folder}" in alone.next
    allow([str(folder)])
    load_and_check(path, sets=[f"evaluate.external.big={{path: {folder}, trust_remote_code: true}}"])


@pytest.mark.parametrize("revision", ["", ", revision: main", ", revision: v1.0", f", revision: {COMMIT[:12]}"])
def test_a_hubs_code_needs_a_commit(tmp_path: Path, revision: str) -> None:
    path = write_project(tmp_path)
    allow(["org/big"])
    (problem,) = refused(path, f"evaluate.external.big={{path: org/big, trust_remote_code: true{revision}}}")
    assert "no commit is named" in problem.what and "40 hex digits" in problem.next
    pinned = f"evaluate.external.big={{path: org/big, trust_remote_code: true, revision: {COMMIT}}}"
    load_and_check(path, sets=[pinned])
    os.environ[VARIABLE] = ""
    (problem,) = refused(path, pinned)
    assert "--allow-python org/big" in problem.next
