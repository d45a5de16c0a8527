"""The candidate: named on dev, by the rule, and by nothing that test says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.gate.candidate import Candidate, candidate
from flows.results.cells import Draws
from flows.results.read import Run, RunArm, read_run
from tests.flows.synthetic_run import SHAPES, SyntheticRun

DRAWS = Draws()
GOOD = {name: replace(SHAPES[name], task=0.905, kl=5e-4, loss=7e-4) for name in ("awq-w4-g128", "gptq-w4-g128")}
SHAPED = {name: SHAPES[name] for name in ("base", "nf4-adapter", "merged-dequantized", "merged-original")} | GOOD
SHAPED["gptq-w4-g32"] = SHAPES["gptq-w4-g32"]
SHAPED["rtn-w3-g128"] = SHAPES["rtn-w3-g128"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    SyntheticRun(home, shapes=SHAPED, test=1200, refused={"awq-w4-g128": "ExLlamaV2 does not read it"}).write()
    return home


@pytest.fixture
def run(home: Path) -> Run:
    return read_run(next((home / "runs").iterdir()), home)


def named(run: Run, **gate_or_promote: dict[str, Any]) -> Candidate:
    return candidate(replace(run, recipe={**run.recipe, **gate_or_promote}), DRAWS)


def test_the_smallest_scheme_within_the_margins_on_dev(run: Run) -> None:
    found = named(run)
    assert found.arm is not None and found.arm.slug == "gptq-w4-g128"
    assert found.left_out["awq-w4-g128"].startswith("the engine of the recipe does not serve it")
    assert found.left_out["gptq-w4-g32"] == "more bytes"
    assert found.left_out["rtn-w3-g128"].startswith("on dev, task against merged-dequantized: −")  # the smallest of all
    assert set(found.left_out) == {"awq-w4-g128", "gptq-w4-g32", "rtn-w3-g128"}  # merged and base are no schemes


@pytest.mark.parametrize("better", ["awq-w4-g128", "gptq-w4-g128"])
def test_of_equal_sizes_the_higher_task_score_on_dev(tmp_path: Path, better: str) -> None:
    shapes = {name: replace(shape, task=0.93 if name == better else shape.task) for name, shape in SHAPED.items()}
    folder = SyntheticRun(tmp_path, shapes=shapes, test=1200).write()
    found = candidate(read_run(folder, tmp_path), DRAWS)
    assert found.arm is not None and found.arm.slug == better
    (other,) = GOOD.keys() - {better}
    assert found.left_out[other] == f"no higher task score than {better}"


def test_no_score_of_test_is_read(run: Run, tmp_path: Path) -> None:
    """The same dev rows beside other rows of test: the same candidate, for the same reasons."""
    before = named(run)
    folder = SyntheticRun(tmp_path, shapes=SHAPED, test=1200, refused={"awq-w4-g128": "no"}).write()
    for path in tmp_path.glob("store/evaluate/*/files/scores.parquet"):
        table = pd.read_parquet(path)
        table.loc[table["split"] != "dev", "sum"] = np.nan
        table.to_parquet(path)
    after = named(read_run(folder, tmp_path))
    assert before.arm is not None and after.arm is not None and after.arm.slug == before.arm.slug
    assert after.left_out["rtn-w3-g128"] == before.left_out["rtn-w3-g128"]


def test_where_nothing_is_within_the_margins_there_is_none(run: Run) -> None:
    found = named(run, gate={"task": 1e-6})
    assert found.arm is None
    assert found.reason == "no scheme of this run is fit for it"
    assert "undecided" in found.left_out["gptq-w4-g128"]


def test_the_recipe_may_name_it(run: Run) -> None:
    for slug in ("gptq-w4-g32", "merged-original", "rtn-w3-g128"):  # the gate will say what it thinks of the last one
        found = named(run, promote={"prefer": slug})
        assert found.arm is not None and (found.arm.slug, found.reason) == (slug, "named by promote.prefer")


@pytest.mark.parametrize(
    ("slug", "changed", "why"),
    [
        ("awq-w4-g128", {}, "the engine of the recipe does not serve it: ExLlamaV2 does not read it"),
        ("base", {}, "the untouched base is nothing to promote"),
        ("nf4-adapter", {}, "not one artifact"),
        ("gptq-w4-g128", {"calibration": "random"}, "it is a control"),
        ("gptq-w4-g128", {"kv": "fp8", "of": "gptq"}, "its files are those of gptq"),
        ("gptq-w4-g128", {"external": True}, "this run did not make it"),
        ("gptq-w4-g128", {"unavailable": "PEFT says no"}, "PEFT says no"),
        ("nothing", {}, "nothing is no arm of this run"),
    ],
)
def test_what_is_no_candidate_is_refused_with_the_reason(
    run: Run, slug: str, changed: dict[str, Any], why: str
) -> None:
    def touched(arm: RunArm) -> RunArm:
        return replace(arm, **changed) if arm.slug == slug else arm

    found = named(replace(run, arms=tuple(map(touched, run.arms))), promote={"prefer": slug})
    assert found.arm is None and why in found.reason


def test_a_scheme_that_failed_is_left_out(tmp_path: Path) -> None:
    broken = {
        "quantize/gptq-w4-g128": {"what": "Scales are NaN.", "where": "layers.3", "why": "zero", "next": "more rows"}
    }
    folder = SyntheticRun(tmp_path, shapes=SHAPED, test=1200, broken=broken).write()
    found = candidate(read_run(folder, tmp_path), DRAWS)
    assert found.arm is not None and found.arm.slug == "awq-w4-g128"
    assert "Scales are NaN" in found.left_out["gptq-w4-g128"]
