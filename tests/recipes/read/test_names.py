"""Names and paths of a recipe: what is taken stays one name below its folder, what no system has is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from recipes.arms import arms
from recipes.checks.check import load_and_check
from recipes.problem import RecipeError
from recipes.read.load import load
from recipes.schema import Evaluate, Promote, Recipe
from recipes.schemes.schema import SchemeSpec
from recipes.scorers import ExactMatchSpec
from tests.recipes.folders import write_project

NASTY = [
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "-rf",
    "--help",
    "a\0b",
    "a\n",
    "\n",
    "con",
    "~",
    "$HOME",
    "*",
]
NASTY += [
    "a" * 300,
    "ａ",
    "а",
    "a\u202eb",
    "a\u200bb",
    "é",
    "İ",
    "ı",
    "COM1",
    " a",
    "a ",
    "",
    "'",
    '"',
    "<b>",
    "a|b",
    "a;b",
]
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=70),
    st.text(alphabet="abc-./\\~\0\n *", max_size=20),
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,70}", fullmatch=True),
)
NAMED: dict[str, tuple[type[BaseModel], Any]] = {
    "recipe": (Recipe, lambda name: {"name": name, "model": {"base": "b"}, "data": {"path": "d"}}),
    "scheme": (SchemeSpec, lambda name: {"scheme": "rtn-w4-g128", "name": name}),
    "external": (Evaluate, lambda name: {"external": {name: "b"}}),
    "scorer": (ExactMatchSpec, lambda name: {"kind": "exact-match", "name": name}),
    "registry": (Promote, lambda name: {"model_name": name}),
}


def taken(kind: str, name: str) -> bool:
    section, values = NAMED[kind]
    try:
        section.model_validate(values(name), strict=True)
    except ValidationError:
        return False
    return True


def assert_one_name(name: str) -> None:
    root = Path("/somewhere/store")
    assert (root / name).resolve().parent == root and name.isascii() and len(name) <= 60
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789.-") and name[0] not in ".-"


@pytest.mark.parametrize("kind", NAMED)
@given(name=TEXTS)
@example(name="a")
@settings(max_examples=300, deadline=None)
def test_a_name_that_is_taken_is_one_plain_name(kind: str, name: str) -> None:
    if taken(kind, name):
        assert_one_name(name)


@pytest.mark.parametrize("kind", NAMED)
def test_nasty_names_are_refused_and_plain_ones_are_not(kind: str) -> None:
    assert [name for name in NASTY if taken(kind, name)] == ["con"]  # a name like others, but on Windows
    assert all(taken(kind, name) for name in ("a", "0", "a-b", "a" * 40))


@given(name=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,59}", fullmatch=True))
@settings(max_examples=100, deadline=None)
def test_slugs_of_arms_are_plain_names(name: str) -> None:
    section = {"schemes": [{"scheme": "gptq-w4-g128", "name": name}]}
    values = {"name": "a", "model": {"base": "b"}, "data": {"path": "d"}, "quantize": section}
    try:
        matrix = arms(Recipe.model_validate(values, strict=True))
    except RecipeError:
        return  # the name of another arm
    assert name in {arm.slug for arm in matrix}
    for arm in matrix:
        assert_one_name(arm.slug)


# ---- paths


@pytest.mark.parametrize("written", ["", " ", "a\0b", "x" * 256, "a/" * 3000, "a\nb", "\x1b[31m", "a\u202eb", "\ud800"])
@pytest.mark.parametrize("field", ["model.base", "data.path", "evaluate.external.prod", "train.adapter"])
def test_a_path_that_no_system_has_is_refused_in_four_parts(tmp_path: Path, field: str, written: str) -> None:
    path = write_project(tmp_path)
    with pytest.raises(RecipeError) as refused:
        load_and_check(path, sets=[f"{field}={json.dumps(written)}"])
    problems = [problem for problem in refused.value.problems if field in problem.where]
    assert problems and all(all(problem.as_dict().values()) for problem in problems), str(refused.value)


@pytest.mark.parametrize("written", ['"a\\0b"', "x" * 300])
def test_so_is_what_a_recipe_extends(tmp_path: Path, written: str) -> None:
    path = write_project(tmp_path, extra=f"extends: {written}\n")
    with pytest.raises(RecipeError, match="not the path of one file"):
        load(path)


@pytest.mark.parametrize("written", ["-rf", "~nobody-here/x", "$(touch x)", "../../../../etc/passwd", "a b"])
def test_a_path_that_leads_nowhere_is_said_to(tmp_path: Path, written: str) -> None:
    path = write_project(tmp_path)
    with pytest.raises(RecipeError) as refused:
        load_and_check(path, sets=[f"model.base={json.dumps(written)}", f"data.path={json.dumps(written)}"])
    assert all(all(problem.as_dict().values()) for problem in refused.value.problems)
