"""The bars of every path add up exactly; what is missing makes a path shorter and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.report.build import evaluate
from flows.report.text import markdown, waterfall_sentence
from flows.results.cells import Draws
from flows.results.comparisons import verdict
from flows.results.power import sentence
from flows.results.read import read_run
from flows.results.rows import RowScores
from flows.results.stats import Interval
from flows.results.waterfall import waterfall
from tests.flows.paths import arm, evidence
from tests.flows.synthetic_run import SyntheticRun

MERGED = "merged-dequantized"
ARMS = (
    arm("base"),
    arm("base-nf4", kind="nf4"),
    arm("nf4-adapter", kind="nf4", adapter="train/x"),
    arm(MERGED, merge_base="dequantized"),
    arm("merged-original", merge_base="original"),
    arm("gptq-w4-g128", merge_base="dequantized", scheme="gptq-w4-g128"),
    arm("rtn-w3-g128", merge_base="dequantized", scheme="rtn-w3-g128"),
    arm("gptq-w4-g128.calib-random", merge_base="dequantized", scheme="gptq-w4-g128", calibration="random"),
    arm("gptq-w4-g128.on-base", scheme="gptq-w4-g128", on_base=True),
    arm("gptq-w4-g128.kv-int8", merge_base="dequantized", scheme="gptq-w4-g128", kv="int8", of="gptq-w4-g128"),
    arm(f"{MERGED}.kv-int8", merge_base="dequantized", kv="int8", of=MERGED),
)
RISE = {"base": 2.5, "base-nf4": 2.6, "rtn-w3-g128": 0.3}  # nats a token over the reference; others 0.001


def losses(*, rows: int = 200) -> dict[str, dict[str, RowScores]]:
    """Losses of every arm on the same rows, two rows a group."""
    rng = np.random.default_rng(5)
    names = np.asarray([f"{index:04d}" for index in range(rows)])
    groups = np.asarray([f"{index // 2:04d}" for index in range(rows)])
    count = rng.integers(5, 40, rows).astype(float)
    shared = rng.gamma(0.5, 0.4, rows)
    return {
        one.slug: {
            "nll": RowScores(
                names, groups, names, (shared + RISE.get(one.slug, 0.001) * rng.gamma(2, 0.5, rows)) * count, count
            )
        }
        for one in ARMS
    }


def made(scores: dict[str, dict[str, RowScores]]) -> dict[str, Any]:
    """The waterfall of these scores."""
    found = waterfall(evidence(ARMS, scores), Draws())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return made(losses())


def test_every_path_adds_up_exactly(whole: dict[str, Any]) -> None:
    scores = losses()
    assert {path["arm"]: [step["step"] for step in path["steps"]] for path in whole["paths"]} == {
        "gptq-w4-g128": ["merge", "weights"],
        "rtn-w3-g128": ["merge", "weights"],
        "gptq-w4-g128.kv-int8": ["merge", "weights", "kv-cache"],
        f"{MERGED}.kv-int8": ["merge", "kv-cache"],
    }
    for path in whole["paths"]:
        assert path["reason"] is None
        assert list(path["losses"]) == ["nf4-adapter", *(step["to"] for step in path["steps"])]
        total = sum(step["difference"] for step in path["steps"])
        assert total == pytest.approx(path["losses"][path["arm"]] - path["losses"]["nf4-adapter"], abs=1e-12)
        for slug, loss in path["losses"].items():
            rows = scores[slug]["nll"]
            assert loss == pytest.approx(rows.total.sum() / rows.count.sum(), rel=1e-12)
    assert (whole["rows"], whole["groups"]) == (200, 100)


def test_bars_are_one_family_and_their_words_follow_from_it(whole: dict[str, Any]) -> None:
    steps = {(step["from"], step["to"]): step for path in whole["paths"] for step in path["steps"]}
    everything = [*steps.values(), whole["base"]]
    assert len(everything) == 6  # merge, two weights, two KV caches, base in NF4
    for step in everything:
        low, high = step["ci95_adjusted"]
        assert low <= step["ci95"][0] <= step["difference"] <= step["ci95"][1] <= high
        assert step["family_size"] == 6
        assert step["verdict"] == verdict("ppl_test", Interval(low, high))
    assert steps[MERGED, "rtn-w3-g128"]["verdict"] == "worse"
    assert steps["nf4-adapter", MERGED]["difference"] > 0
    assert (whole["base"]["step"], whole["base"]["from"], whole["base"]["to"]) == ("nf4", "base", "base-nf4")
    base, nf4 = (losses()[slug]["nll"].sums.value for slug in ("base", "base-nf4"))
    assert whole["base"]["difference"] == pytest.approx(nf4 - base) and nf4 != base


@pytest.mark.parametrize(
    ("gone", "arms"),
    [
        (MERGED, {"gptq-w4-g128": 0, "rtn-w3-g128": 0, "gptq-w4-g128.kv-int8": 0, f"{MERGED}.kv-int8": 0}),
        ("gptq-w4-g128", {"gptq-w4-g128": 1, "gptq-w4-g128.kv-int8": 1}),
        ("gptq-w4-g128.kv-int8", {"gptq-w4-g128.kv-int8": 2}),
    ],
)
def test_a_missing_arm_shortens_what_leads_through_it(gone: str, arms: dict[str, int]) -> None:
    scores = losses()
    del scores[gone]
    for path in made(scores)["paths"]:
        if path["arm"] in arms:
            assert path["reason"] == f"{gone}: evaluate/{gone}: planted"
            assert len(path["steps"]) == arms[path["arm"]]
            assert len(path["losses"]) == (1 + len(path["steps"]) if path["steps"] else 0)
        else:
            assert path["reason"] is None


def test_other_rows_and_nan_are_no_stops() -> None:
    scores = losses()
    nan = scores["gptq-w4-g128"]["nll"]
    nan.total[3] = np.nan
    scores["rtn-w3-g128"] = losses(rows=198)["rtn-w3-g128"]
    found = {path["arm"]: path for path in made(scores)["paths"]}
    assert found["gptq-w4-g128"]["reason"] == "gptq-w4-g128: losses that are not finite"
    assert "other rows" in found["rtn-w3-g128"]["reason"]
    assert [step["step"] for step in found["rtn-w3-g128"]["steps"]] == ["merge"]


def test_without_base_in_nf4_there_is_no_bar_of_it_and_without_reference_nothing() -> None:
    scores = losses()
    del scores["base-nf4"]
    assert made(scores)["base"] is None
    del scores["nf4-adapter"]
    assert waterfall(evidence(ARMS, scores), Draws()) is None


def test_the_report_has_both_and_every_scheme_has_its_path(tmp_path: Path) -> None:
    report = evaluate(read_run(SyntheticRun(tmp_path, test=120, general=40).write(), tmp_path))
    schemes = [slug for slug in report["arms"] if slug.startswith(("awq", "gptq", "rtn")) and "." not in slug]
    assert [path["arm"] for path in report["waterfall"]["paths"]] == schemes
    assert [one["arm"] for one in report["power"]] == schemes
    for path in report["waterfall"]["paths"]:
        total = sum(step["difference"] for step in path["steps"])
        assert total == pytest.approx(path["losses"][path["arm"]] - path["losses"]["nf4-adapter"], abs=1e-12)
        loss = np.log(report["arms"][path["arm"]]["metrics"]["ppl_test"]["value"])
        assert path["losses"][path["arm"]] == pytest.approx(loss, rel=1e-9)
    for told in (sentence(report["power"]), waterfall_sentence(report["waterfall"])):
        assert told is not None and told in markdown(report)
