"""Secrets: what is one, what is shown in its place, and that no recipe holds one."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.checks.check import load_and_check
from recipes.problem import Problem, RecipeError
from recipes.secrets import hide, is_secret, secrets_in
from tests.recipes.folders import write_project

HUB = "hf_" + "Planted0" * 4 + "xy"
PLANTED = {
    HUB: "a Hugging Face token",
    "ghp_" + "Planted0" * 4 + "abcd": "a GitHub token",
    "pnu_" + "Planted0" * 4 + "abcd": "a Prefect API key",
    "AKIA" + "PLANTED0" * 2: "an AWS key id",
    "sk-" + "planted-0" * 4: "an API key",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl": "a signed token (JWT)",
    "postgresql://me:planted-secret@db/x": "a URL with a password",
}


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


@pytest.mark.parametrize("token", PLANTED)
def test_a_secret_by_its_form_is_hidden_and_found(token: str) -> None:
    text = hide(f"before {token}/path, and after")
    assert token not in text and "planted-secret" not in text and "before " in text and "and after" in text
    assert PLANTED[token] in list(secrets_in(f"base: {token}"))


def test_a_variables_value_is_hidden_whatever_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse battery")
    monkeypatch.setenv("DATABASE", "postgresql://me:p%40ssw0rd-planted@db/x")
    assert hide("denied: correct horse battery!") == "denied: ***!"
    assert hide("p%40ssw0rd-planted and p@ssw0rd-planted") == "*** and ***"
    assert list(secrets_in("# correct horse battery")) == [
        "the value of the environment variable MLFLOW_TRACKING_PASSWORD"
    ]


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


@pytest.mark.parametrize("token", PLANTED)
def test_a_recipe_that_holds_one_is_refused_with_its_line(tmp_path: Path, token: str) -> None:
    path = write_project(tmp_path)
    load_and_check(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], f"# mine: {token}", *lines[2:]]) + "\n")
    with pytest.raises(RecipeError) as refused:
        load_and_check(path)
    problem = refused.value.problems[0]
    assert PLANTED[token] in problem.what and problem.where.endswith("recipe.yaml:3") and "HF_TOKEN" in problem.next
    assert token not in str(refused.value)


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
