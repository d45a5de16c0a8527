"""Scores of further scorers in the report: cells, intervals, families, and what a scorer that failed leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.report.build import evaluate, render
from flows.results.metrics import METRICS, difference_text, further, value_text
from flows.results.read import read_run
from tests.flows.synthetic_run import SHAPES, SyntheticRun

FEW = ("base", "nf4-adapter", "merged-dequantized", "gptq-w4-g128", "rtn-w3-g128")
SCORERS = [
    {"kind": "sql-execution", "name": None},
    {"kind": "python", "name": "polite"},
    {"kind": "exact-match", "name": None},
    {"kind": "lm-eval", "name": "quiz"},
]
FAILED = {
    "what": "the scorer polite failed on 1 of 120 answers",
    "where": "row 0123, answer 'x'",
    "why": "score raised KeyError: 'x'",
    "next": "make the scorer return 0 for what it cannot read",
}


def write(home: Path, *, failed: dict[str, str] | None = None) -> Path:
    """A run with four scorers: fractions, copies of `task`, 50 documents. `failed`: arm -> metric without scores."""
    folder = SyntheticRun(home, test=120, general=20, shapes={slug: SHAPES[slug] for slug in FEW}).write()
    recipe = json.loads((folder / "recipe.resolved.json").read_text())
    recipe["evaluate"]["scorers"] = SCORERS
    (folder / "recipe.resolved.json").write_text(json.dumps(recipe))
    for number, slug in enumerate(FEW):
        step = next((home / "store" / "evaluate").glob(f"{slug}-????????????"))
        table = pd.read_parquet(step / "files" / "scores.parquet")
        task = table[table.metric == "task"]
        rng = np.random.default_rng(number)
        polite = task.assign(metric="task.polite", sum=task["sum"] * 0.5 + rng.random(len(task)) / 2)
        right = rng.random(50) < (0.9 if slug != "rtn-w3-g128" else 0.1)
        names = [f"quiz/{document}-0a0b" for document in range(50)]
        quiz = pd.DataFrame({"row": names, "group": names, "split": "test", "domain": "quiz", "metric": "task.quiz"})
        quiz = quiz.assign(sum=right.astype(float), n=1)
        table = pd.concat([table, polite, task.assign(metric="task.exact-match"), quiz])
        if metric := (failed or {}).get(slug):
            table = table[table.metric != metric]
            manifest = json.loads((step / "manifest.json").read_text())
            manifest["result"]["problems"] = {metric: FAILED}
            (step / "manifest.json").write_text(json.dumps(manifest))
        table.to_parquet(step / "files" / "scores.parquet")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    folder = write(home)
    render(folder, home)
    (home / "folder").symlink_to(folder)
    return json.loads((folder / "report.json").read_text()) | {"folder": folder}


def test_every_scorer_has_a_cell_of_every_arm(report: dict[str, Any]) -> None:
    names = ["task.polite", "task.exact-match", "task.quiz"]
    assert [one["metric"] for one in report["scorers"]] == ["task", *names]
    assert report["scorer"] == "sql-execution"
    for slug, arm in report["arms"].items():
        assert arm["ranked"], slug
        for name in names:
            cell = arm["metrics"][name]
            assert cell["ci95"][0] <= cell["value"] <= cell["ci95"][1] and cell["split"] == "test"
            assert cell["n"] == (50 if name == "task.quiz" else 120)
            assert report["directions"][name] == "higher" and report["meanings"][name]
        assert arm["metrics"]["task.exact-match"] == arm["metrics"]["task"]  # the same scores
        assert "task.polite@join" in report["domains"][slug] and "task.quiz@quiz" not in report["domains"][slug]


def test_fractions_have_an_interval_of_means_within_0_and_1(report: dict[str, Any], tmp_path: Path) -> None:
    """Wilson's would be that of 0 and 1, far too wide: the spread of these scores is known."""
    cell = report["arms"]["gptq-w4-g128"]["metrics"]["task.polite"]
    task = report["arms"]["gptq-w4-g128"]["metrics"]["task"]
    assert cell["value"] == pytest.approx(task["value"] / 2 + 0.25, abs=0.03)
    assert cell["ci95"][1] - cell["ci95"][0] < 0.75 * (task["ci95"][1] - task["ci95"][0])


def test_two_families_compare_on_every_scorer(report: dict[str, Any]) -> None:
    found: dict[str, set[str]] = {}
    for one in report["comparisons"]:
        found.setdefault(one["family"], set()).add(one["metric"])
    further_ones = {"task.polite", "task.exact-match", "task.quiz"}
    assert {name for name, metrics in found.items() if metrics & further_ones} == {"fine-tuning", "quantization"}
    assert all(found[name] >= further_ones for name in ("fine-tuning", "quantization"))
    sizes = {one["name"]: one["size"] for one in report["families"]}
    assert (sizes["fine-tuning"], sizes["quantization"]) == (3 + 3, 2 * (3 + 3))
    words = {
        (one["a"], one["metric"]): one["verdict"] for one in report["comparisons"] if one["b"] == "merged-dequantized"
    }
    assert words["rtn-w3-g128", "task.quiz"] == "worse"


def test_people_see_them(report: dict[str, Any]) -> None:
    text = (report["folder"] / "report.md").read_text()
    assert "| arm                |   task.polite % ↑ |" in text
    assert "task.quiz % ↑" in (report["folder"] / "report.html").read_text()


def test_a_scorer_that_failed_empties_its_own_cell(tmp_path: Path) -> None:
    folder = write(tmp_path, failed={"gptq-w4-g128": "task.polite"})
    report = evaluate(read_run(folder, tmp_path))
    cell = report["arms"]["gptq-w4-g128"]["metrics"]["task.polite"]
    assert cell["value"] is None and "failed on 1 of 120 answers (score raised KeyError: 'x')" in cell["reason"]
    assert report["arms"]["gptq-w4-g128"]["ranked"] and report["not_ranked"] == {}
    (failure,) = report["failures"]
    assert (failure["step"], failure["status"], failure["arms"]) == (
        "evaluate/gptq-w4-g128",
        "partial",
        ["gptq-w4-g128"],
    )
    assert failure["problem"]["where"] == "row 0123, answer 'x'"
    lost = {(one["a"], one["metric"]) for one in report["comparisons_left_out"]}
    assert lost == {("gptq-w4-g128", "task.polite")}
    render(folder, tmp_path)
    assert "score raised KeyError" in (folder / "report.md").read_text()
    assert "1 failed, 0 could not run" in (folder / "report.html").read_text()


def test_an_arm_without_the_first_score_is_not_ranked(tmp_path: Path) -> None:
    report = evaluate(read_run(write(tmp_path, failed={"gptq-w4-g128": "task"}), tmp_path))
    assert list(report["not_ranked"]) == ["gptq-w4-g128"]
    assert report["not_ranked"]["gptq-w4-g128"].startswith("task: the scorer polite failed")
    assert report["arms"]["gptq-w4-g128"]["status"] == "ok"
    assert report["arms"]["gptq-w4-g128"]["metrics"]["kl_mean"]["value"] is not None


def test_a_first_score_that_no_arm_has_ranks_none(tmp_path: Path) -> None:
    report = evaluate(read_run(write(tmp_path, failed=dict.fromkeys(FEW, "task")), tmp_path))
    assert set(report["not_ranked"]) == set(FEW)  # unlike plain texts, which have nothing to score


def test_names_are_made_when_asked_for() -> None:
    assert [one.name for one in further({"evaluate": {"scorers": SCORERS}})] == [
        "task.polite",
        "task.exact-match",
        "task.quiz",
    ]
    assert further({}) == []
    assert not any(name.startswith("task.") for name in METRICS)
    with pytest.raises(KeyError):
        METRICS["taste"]
    assert value_text("task.polite", 0.5, [0.4, 0.6], unit=True) == value_text("task", 0.5, [0.4, 0.6], unit=True)
    assert difference_text("task.polite", 0.1, [0.05, 0.15]).endswith("points")
