"""The command line: exit codes, JSON, and bad input refused before anything starts."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import _parser
from tasks.runtime.process.launch import CHECKOUT
from tests.conftest import QUICKSTART, write_small_recipe


def quench(*words: str, home: Path, check: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        env={**os.environ, "QUENCH_HOME": str(home), "PYTHONPATH": str(CHECKOUT)},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_small_recipe(tmp_path / "project")


def test_check_is_light_and_quick(tmp_path: Path, recipe: Path):
    clock = time.monotonic()
    quench("check", str(recipe), home=tmp_path / "home", check=0)
    seconds = time.monotonic() - clock
    heavy = ["torch", "transformers", "prefect", "mlflow", "numpy", "pandas", "pyarrow"]
    code = (
        "import sys; from flows.cli import main; main(['check', sys.argv[1]]);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    print(f"quench check: {seconds:.2f} s")  # shown with -s; wall time is a benchmark, not a test


def test_every_problem_at_once_with_file_and_line(tmp_path: Path, recipe: Path):
    text = recipe.read_text().replace("rank: 8", "rnak: 8").replace("schemes: [gptq-w4-g128", "schemes: [gptq-w5-g128")
    recipe.write_text(text.replace("path: rows.jsonl", "path: row.jsonl"))
    said = quench("check", str(recipe), home=tmp_path / "home", check=2).stderr
    assert "rnak" in said and "rank" in said and "recipe.yaml:5" in said


def test_json_refusal_has_the_four_parts(tmp_path: Path, recipe: Path):
    done = quench("check", str(recipe), "--json", "--set", "calibrate.rows=64", home=tmp_path / "home", check=2)
    (problem,) = json.loads(done.stdout)["problems"]
    assert set(problem) == {"what", "where", "why", "next"} and all(problem.values())
    assert "128" in json.dumps(problem)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_bad_rows_are_refused_before_a_server_starts(tmp_path: Path, recipe: Path, command: str):
    rows = recipe.with_name("rows.jsonl")
    rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "x"}]}\nnot json\n')
    said = quench(command, str(recipe), home=tmp_path / "home", check=2).stderr
    assert "rows.jsonl:701" in said and "rows.jsonl:702" in said and "nothing was started" in said
    assert not (tmp_path / "home" / "prefect").exists()


def test_fewer_rows_than_calibration_needs(tmp_path: Path, recipe: Path):
    rows = recipe.with_name("rows.jsonl")
    rows.write_text("\n".join(rows.read_text().splitlines()[:120]) + "\n")
    said = quench("check", str(recipe), "--data", home=tmp_path / "home", check=2).stderr
    assert "calibrate" in said and "128" in said


def test_no_report_yet_says_what_to_type(tmp_path: Path):
    assert "quench run RECIPE" in quench("report", home=tmp_path / "home", check=2).stderr


def test_an_empty_store_lists_and_verifies(tmp_path: Path):
    assert quench("store", "ls", home=tmp_path / "home", check=0).stdout == "the store is empty\n"
    assert json.loads(quench("store", "verify", "--json", home=tmp_path / "home", check=0).stdout)["artifacts"] == 0


def test_the_quickstarts_own_recipe_checks_with_its_rows(tmp_path: Path):
    recipe = str(QUICKSTART / "recipe.yaml")
    said = quench("check", recipe, "--data", home=tmp_path / "home", check=0).stdout
    assert said.splitlines()[-1] == f"look at what is trained: quench show {recipe}"


def test_schemes_lists_what_recipes_may_name(tmp_path: Path):
    slugs = {one["slug"] for one in json.loads(quench("schemes", "--json", home=tmp_path / "home", check=0).stdout)}
    assert {"awq-w4-g128", "gptq-w3-g128", "rtn-w4-g32"} <= slugs


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path):
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads: the first flush meets a broken pipe
    environment = {**os.environ, "QUENCH_HOME": str(tmp_path / "home"), "PYTHONPATH": str(CHECKOUT)}
    words = [sys.executable, "-m", "flows.cli", "schemes", "--json"]
    done = subprocess.run(words, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Every command, those of `store` and `track` among them."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return [parser]
    return [command for group in groups for inner in group.choices.values() for command in commands(inner)]


def test_every_command_has_its_body():
    found = commands(_parser())
    assert len(found) == 24
    for command in found:
        module = importlib.import_module(command.get_default("module"))
        assert callable(getattr(module, command.get_default("function")))
