"""Identity is stable, and what cannot be stable is refused with its path."""

import subprocess
import sys

import pytest

from recipes.schema import Train
from tasks.runtime.fingerprint import UnstableValue, canonical, difference, fingerprint


def test_same_content_in_another_order_is_the_same_print():
    assert fingerprint({"a": 1, "b": [1, {"c": None}]}) == fingerprint({"b": (1, {"c": None}), "a": 1})


def test_equal_numbers_are_equal_and_close_ones_are_not():
    assert fingerprint({"x": 2.0}) == fingerprint({"x": 2})
    assert fingerprint({"x": 0.1}) != fingerprint({"x": 0.1 + 2e-17})
    assert fingerprint({"x": True}) != fingerprint({"x": 1})


def test_print_does_not_depend_on_the_process():
    code = "from tasks.runtime.fingerprint import fingerprint; print(fingerprint({'a': 'ä', 'b': [0.3]}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {fingerprint({"a": "ä", "b": [0.3]})}


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), float("inf"), b"x", print])
def test_unstable_value_is_refused_with_its_path(value):
    with pytest.raises(UnstableValue, match=r"identity\.train\.targets\[1\]"):
        canonical({"train": {"targets": ["q", value]}})


def test_a_model_is_its_fields():
    assert canonical(Train(rank=8)) == canonical(Train(rank=8).model_dump())


def test_difference_names_the_fields():
    old = {"params": {"rank": 8, "alpha": 16}, "inputs": {"base": "a" * 64}}
    new = {"params": {"rank": 16, "alpha": 16}, "inputs": {"base": "b" * 64}}
    assert difference(old, new) == [f"inputs.base: {'a' * 12} -> {'b' * 12}", "params.rank: 8 -> 16"]
    assert difference(new, new) == []
