"""Secrets: what is one, what is shown in its place, and that no recipe holds one."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from recipes.checks.check import load_and_check
from recipes.problem import Problem, RecipeError
from recipes.secrets import hide, is_secret, secrets_in
from tests.recipes.folders import write_project
from tests.recipes.keys import SHAPES, honest_names, key_in, keys

HUB = SHAPES["a Hugging Face token"]


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "x", True),
        ("MLFLOW_TRACKING_PASSWORD", "x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("WANDB_API_KEY", "x", True),
        ("PREFECT_API_AUTH_STRING", "x", True),
        ("PGPASSWORD", "x", True),
        ("MLFLOW_TRACKING_URI", "http://me:planted@127.0.0.1:5000", True),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("PATH", "/usr/bin", False),
        ("CUDA_VISIBLE_DEVICES", "0", False),
        ("LD_LIBRARY_PATH", "/usr/lib", False),
        ("OMP_NUM_THREADS", "1", False),
    ],
)
def test_which_variables_children_do_not_get(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


@pytest.mark.parametrize("kind", SHAPES)
def test_a_secret_by_its_form_is_hidden_and_found(kind: str) -> None:
    held = key_in(SHAPES[kind])
    text = f"before {SHAPES[kind]} and after"
    (found,) = secrets_in(text)
    assert (found.what, found.shown in text) == (kind.partition(":")[0], False)
    assert text[found.start :].startswith(held) or held in text[found.start :]
    shown = hide(text)
    assert held not in shown and shown.startswith("before ") and shown.endswith(" and after")
    for around in ('{{"x": "{}"}}', "x={}&y=1", "%3D{}", "line\\n{}", "({}).", "{},{}", "/{}/"):
        assert held not in hide(around.replace("{}", SHAPES[kind])), around


def test_no_key_of_any_kind_is_missed_more_than_once_in_a_hundred() -> None:
    """200 draws of each kind; those of 20 characters that may hold separators are missed most often."""
    rng = random.Random(5)
    missed = Counter(kind for _ in range(200) for kind, line in keys(rng).items() if key_in(line) in hide(line))
    assert {kind: count for kind, count in missed.items() if count > 2} == {}
    assert missed.total() <= 4, missed


def test_first_and_last_two_letters_are_shown() -> None:
    (found,) = secrets_in(f"token is {HUB}.")
    assert found.shown == f"hf…{HUB[-2:]}, 37 characters" and found.start == len("token is ")
    (found,) = secrets_in("postgresql://me:planted-pass@db/x")
    assert found.shown == "12 characters"  # four of twelve letters would be too much


def test_names_that_only_look_like_keys_are_left_alone() -> None:
    names = honest_names(random.Random(7))
    assert len(names) >= 100
    wrong = [name for name in names if list(secrets_in(f"base: {name}\n# {name}")) or hide(name) != name]
    assert wrong == []


def test_a_variables_value_is_hidden_whatever_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse battery")
    monkeypatch.setenv("DATABASE", "postgresql://me:p%40ssw0rd-planted@db/x")
    assert hide("denied: correct horse battery!") == "denied: ***!"
    assert hide("p%40ssw0rd-planted and p@ssw0rd-planted") == "*** and ***"
    (found,) = secrets_in("# correct horse battery")
    assert found.what == "the value of the environment variable MLFLOW_TRACKING_PASSWORD"


def test_a_variable_that_is_a_word_or_a_path_takes_no_words_and_paths_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/project")
    plain = "postgresql://db/x and /home/me/project/rows.jsonl"
    assert hide(plain) == plain and list(secrets_in(f"{plain} postgres")) == []
    assert hide("password postgres is wrong") == "password *** is wrong"


@pytest.mark.parametrize(
    "plain",
    [
        "write --postgres postgresql://USER:PASSWORD@HOST/DATABASE",
        "hub id Qwen/Qwen3-8B at https://huggingface.co/Qwen/Qwen3-8B",
        "http://127.0.0.1:4200/api, then http://[::1]:5000",
        "the token hf_token, sk-learn, sha256 " + "0123456789abcdef" * 4,
        "http://me:${PASSWORD}@host and http://me:***@host",
    ],
)
def test_what_is_no_secret_is_left_alone(plain: str) -> None:
    assert hide(plain) == plain and list(secrets_in(plain)) == []


def test_a_problem_shows_none() -> None:
    text = str(Problem(what=f"no {HUB}", where="http://me:planted-secret@h", why=HUB, next=HUB))
    assert HUB not in text and "planted-secret" not in text and text.count("***") == 4


@pytest.mark.parametrize("kind", SHAPES)
def test_a_recipe_that_holds_one_is_refused_with_its_line(tmp_path: Path, kind: str) -> None:
    path = write_project(tmp_path)
    load_and_check(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], f"# mine: {SHAPES[kind]}", *lines[2:]]) + "\n")
    with pytest.raises(RecipeError) as refused:
        load_and_check(path)
    (problem,) = refused.value.problems
    assert kind.partition(":")[0] in problem.what and problem.where.endswith("recipe.yaml:3 in a comment")
    assert "HF_TOKEN" in problem.next and key_in(SHAPES[kind]) not in str(refused.value)


def test_the_key_of_the_recipe_is_named(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    text = path.read_text()
    for lines in (f"  revision: {HUB}\n", f"  revision: >-\n    {HUB}\n"):
        path.write_text(text.replace("model:\n", f"model:\n{lines}"))
        number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if HUB in line)
        with pytest.raises(RecipeError) as refused:
            load_and_check(path)
        problem = refused.value.problems[0]
        assert problem.where.endswith(f"recipe.yaml:{number} model.revision")
        assert f"hf…{HUB[-2:]}, 37 characters" in problem.what
    path.write_text(f"name: [\nmine: {HUB}\n")  # no YAML: the line all the same
    with pytest.raises(RecipeError) as refused:
        load_and_check(path)
    assert refused.value.problems[0].where.endswith("recipe.yaml:2")


def test_a_recipe_of_honest_names_is_not_refused(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    names = honest_names(random.Random(8))
    path.write_text(path.read_text() + "".join(f"# {name}\n" for name in names))
    load_and_check(path)


def test_an_override_and_an_extended_recipe_are_refused_too(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    for sets in ([f"model.revision={HUB}"], [f"nonsense={HUB}"], [f"train.rank={HUB}"]):
        with pytest.raises(RecipeError) as refused:
            load_and_check(path, sets=sets)
        assert "a Hugging Face token" in str(refused.value) and HUB not in str(refused.value)
    below = tmp_path / "below.yaml"
    below.write_text("extends: recipe.yaml\n")
    path.write_text(path.read_text() + f"# {HUB}\n")
    with pytest.raises(RecipeError) as refused:
        load_and_check(below)
    assert "a Hugging Face token" in str(refused.value) and HUB not in str(refused.value)
