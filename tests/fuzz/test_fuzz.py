"""Some of the cases of `make fuzz`, through the command itself: docs/results/fuzz.md has all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.door import by_process
from tests.fuzz.kinds import KINDS
from tests.fuzz.run import cases, environment

LEAST_PASSED = 0.2  # of the cases: a mutator that breaks all of them would show nothing


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Restores what `cases` sets."""
    for name in environment(tmp_path):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.mark.parametrize("name", KINDS)
def test_no_input_gets_more_than_a_refusal(name: str) -> None:
    kind = KINDS[name]
    tally = cases(kind, range(1, kind.quick + 1))
    assert tally.faults == {}
    assert tally.passed + tally.refused == tally.cases == kind.quick
    assert tally.passed >= LEAST_PASSED * tally.cases
    assert tally.refused >= 1  # nor would one that breaks none of them


def test_a_case_is_a_function_of_its_number() -> None:
    for kind in KINDS.values():
        assert kind.make(7) == kind.make(7)
        assert len({kind.make(number) for number in range(5)}) > 1


def test_a_process_that_raises_is_a_fault(tmp_path: Path) -> None:
    """The check of the check: a module that raises when it is imported is not taken for an answer."""
    (tmp_path / "yaml.py").write_text("raise ValueError('planted')")
    env = environment(tmp_path) | {"PYTHONPATH": str(tmp_path)}
    assert "planted" in by_process(["check", str(tmp_path / "recipe.yaml")], env=env)
