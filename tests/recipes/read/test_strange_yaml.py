"""Recipes of strangers: YAML that means something else, holds something else, or never ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from recipes.plain_yaml import DEEPEST, MOST_VALUES, Loader
from recipes.read.load import load
from recipes.read.yamlfile import MOST_CHARS
from tests.recipes.read.test_load import MINIMAL, refused, write


def aliases(levels: int) -> str:
    """10 ** levels values in a few lines."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{number}: &x{number} [{', '.join([f'*x{number - 1}'] * 10)}]" for number in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("seed: !!int x", "`x` is no int"),
        ("seed: !!float x", "`x` is no float"),
        ("seed: !!bool x", "`x` is no bool"),
        ("seed: !!timestamp 2001-99-99", "tag:yaml.org,2002:timestamp"),
        ("seed: !!binary eA==", "tag:yaml.org,2002:binary"),
        ("seed: !!set {a, b}", "tag:yaml.org,2002:set"),
        ("seed: !!python/object/apply:os.system [true]", "python/object/apply:os.system"),
        ("seed: 99999999999999999999", "more than 64 bits"),
        ("seed: " + "1" * 5000, "is no int"),
        ("seed: 0x" + "f" * 5000, "more than 64 bits"),
        ("seed: " + "[" * 3000, "nested deeper than 50 levels"),
        ("seed: " + "[" * 400 + "]" * 400, "nested deeper than 50 levels"),
        ("seed: &a [*a]", "an alias holds itself"),
        ("seed: &a {x: *a}", "an alias holds itself"),
        ("? [a, b]\n: 1", "unhashable"),
    ],
)
def test_what_json_does_not_have_is_refused_with_its_line(tmp_path: Path, line: str, why: str) -> None:
    (problem,) = refused(write(tmp_path, f"{MINIMAL}train:\n  {line}\n".replace("\n: 1", "\n  : 1")))
    assert problem.what == "The recipe holds what no recipe may hold."
    assert why in problem.why and "recipe.yaml:5" in problem.where and "without tags" in problem.next


def test_aliases_that_stand_for_gigabytes_are_counted_and_not_made(tmp_path: Path) -> None:
    began = time.process_time()
    (problem,) = refused(write(tmp_path, MINIMAL + aliases(12)))
    assert f"more than {MOST_VALUES:,} values" in problem.why
    assert time.process_time() - began < 5  # it takes 0.3 s; put in their places, the values would take hours


def test_a_few_aliases_and_merge_keys_are_read(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace("name: test", "name: &n test") + "train: {<<: {rank: 4}, alpha: 8}\npromote: {model_name: *n}\n"
    )
    recipe = load(write(tmp_path, text)).recipe
    assert (recipe.train.rank, recipe.train.alpha, recipe.promote.model_name) == (4, 8, "test")


def test_an_equals_sign_is_text(tmp_path: Path) -> None:
    assert load(write(tmp_path, MINIMAL + "calibrate: {rows: 99, allow_unusual_size: =}\n")).recipe.name == "test"


@pytest.mark.parametrize("where", ["recipe", "extends"])
def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path, where: str) -> None:
    path = Path("/dev/zero") if where == "recipe" else write(tmp_path, MINIMAL + "extends: /dev/zero\n")
    (problem,) = refused(path)
    assert problem.what == "/dev/zero is not a recipe." and f"more than {MOST_CHARS:,} characters" in problem.why


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
@pytest.mark.parametrize("field", ["alpha", "learning_rate", "max_grad_norm", "epochs"])
def test_a_number_is_finite(tmp_path: Path, field: str, value: str) -> None:
    (problem,) = refused(write(tmp_path, f"{MINIMAL}train: {{{field}: {value}}}\n"))
    assert problem.where.endswith(f"recipe.yaml:4 train.{field}")
    assert "has to be" in problem.what


def test_a_thousand_unknown_keys_take_seconds(tmp_path: Path) -> None:
    began = time.process_time()
    problems = refused(write(tmp_path, MINIMAL + "".join(f"key{number}: 1\n" for number in range(1000))))
    assert len(problems) == 1000
    assert time.process_time() - began < 10  # 1 s; each of them walked through the schema once


def test_what_a_terminal_would_obey_is_shown_as_its_escape(tmp_path: Path) -> None:
    (problem,) = refused(write(tmp_path, MINIMAL + 'train: {"\\x1b[31mrank\\u202e": 1}\n'))
    assert problem.what.isprintable() and "`\\x1b[31mrank\\u202e` is no key" in problem.what
    (problem,) = refused(write(tmp_path, MINIMAL + 'train: {schedule: "\\uD800"}\n'))
    assert problem.what.endswith("it has to be text without halves of surrogate pairs.")
    (problem,) = refused(write(tmp_path, MINIMAL + "train: {r\u00a0ank: 1}\n"))
    assert "`r\\xa0ank`" in problem.what


@pytest.mark.parametrize("depth", range(DEEPEST - 2, DEEPEST + 3))
def test_what_is_nested_as_deep_as_may_be_is_read_and_one_more_is_refused(depth: int) -> None:
    """The innermost list is empty: it ends at the last level that is looked at."""
    if depth > DEEPEST:
        with pytest.raises(yaml.YAMLError, match="nested deeper"):
            Loader("[" * depth + "]" * depth).get_single_node()
    else:
        assert Loader("[" * depth + "]" * depth).get_single_node() is not None
