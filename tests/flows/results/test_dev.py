"""Figures of dev: from dev rows alone, by the functions of test, in a section that promotes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.report.build import evaluate
from flows.report.dev import HEADING, lead
from flows.report.html import page
from flows.report.text import markdown
from flows.results.metrics import value_text
from flows.results.read import read_run
from recipes.arms import NOT_DECODED
from tests.flows.synthetic_run import SHAPES, SyntheticRun

BROKEN = {"what": "Scales are NaN.", "where": "layers.3", "why": "a channel is zero", "next": "raise calibrate.rows"}
FEW = {
    slug: SHAPES[slug]
    for slug in ("base", "nf4-adapter", "merged-dequantized", "merged-original", "gptq-w4-g128", "gptq-w3-g128")
} | {"rtn-w3-g128": replace(SHAPES["rtn-w3-g128"], task=0.6)}


def tables(home: Path) -> dict[str, Path]:
    return {
        path.parent.parent.name.rsplit("-", 1)[0]: path
        for path in home.glob("store/evaluate/*/files/*s.parquet")
        if path.name == "scores.parquet"
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose dev rows are not those of test: half of them, with half of a nat more each."""
    home = tmp_path_factory.mktemp("home")
    SyntheticRun(
        home, test=240, general=40, measured=False, shapes=FEW, broken={"quantize/gptq-w3-g128": BROKEN}
    ).write()
    for path in tables(home).values():
        table = pd.read_parquet(path)
        dev = table["split"] == "dev"
        table.loc[dev & (table["metric"] == "nll"), "sum"] += 0.5
        rows = sorted(set(table.loc[dev, "row"]))
        table[~dev | table["row"].isin(rows[::2])].to_parquet(path)
    return home


@pytest.fixture(scope="module")
def report(home: Path) -> dict[str, Any]:
    return json.loads(json.dumps(evaluate(read_run(next((home / "runs").iterdir()), home))))


def test_figures_equal_those_of_pandas(home: Path, report: dict[str, Any]) -> None:
    dev = report["dev"]
    assert (dev["split"], dev["rows"], list(dev["arms"])) == ("dev", 120, list(FEW))
    for slug, path in tables(home).items():
        table = pd.read_parquet(path)
        own = table[table["split"] == "dev"]
        nll, task = (own[own["metric"] == metric] for metric in ("nll", "task"))
        cells = dev["arms"][slug]["metrics"]
        assert list(cells) == ["task", "loss"]
        assert cells["loss"]["value"] == pytest.approx(nll["sum"].sum() / nll["n"].sum())
        assert cells["task"]["value"] == pytest.approx(task["sum"].mean()) and cells["task"]["n"] == 120
        for cell in cells.values():
            assert cell["split"] == "dev" and cell["ci95"][0] <= cell["value"] <= cell["ci95"][1]
        assert dev["tokens"] == nll["n"].sum() and dev["groups"] == nll["group"].nunique()


def test_every_arm_is_compared_with_its_merged_model(report: dict[str, Any]) -> None:
    arms = report["dev"]["arms"]
    assert {slug: arm["against"] for slug, arm in arms.items()} == {
        "base": "merged-dequantized",
        "nf4-adapter": "merged-dequantized",
        "merged-dequantized": "merged-original",
        "merged-original": "merged-dequantized",
        "gptq-w4-g128": "merged-dequantized",
        "gptq-w3-g128": None,  # it failed
        "rtn-w3-g128": "merged-dequantized",
    }
    for slug, arm in arms.items():
        for metric, one in arm["differences"].items():
            value, other = (arms[name]["metrics"][metric]["value"] for name in (slug, arm["against"]))
            assert one["difference"] == pytest.approx(value - other)
            low, high = one["ci95_adjusted"]
            assert low <= one["ci95"][0] <= one["difference"] <= one["ci95"][1] <= high
            gain = -one["difference"] if metric == "loss" else one["difference"]
            word = "no difference shown" if low <= 0 <= high else "better" if gain > 0 else "worse"
            assert one["verdict"] == word
    assert report["dev"]["family_size"] == sum(len(arm["differences"]) for arm in arms.values())
    assert arms["rtn-w3-g128"]["differences"]["task"]["verdict"] == "worse"
    assert arms["gptq-w3-g128"]["metrics"]["loss"]["reason"] and arms["gptq-w3-g128"]["differences"] == {}


def test_test_rows_have_no_part_in_it(home: Path, report: dict[str, Any], tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, test=100, general=0, measured=False, shapes=FEW)
    folder = run.write()
    before = evaluate(read_run(folder, tmp_path))
    for path in tables(tmp_path).values():
        table = pd.read_parquet(path)
        table.loc[table["split"] == "test", "sum"] = np.nan
        table.to_parquet(path)
    assert evaluate(read_run(folder, tmp_path))["dev"] == before["dev"]


def test_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    shapes = {slug: FEW[slug] for slug in ("nf4-adapter", "merged-dequantized", "gptq-w4-g128", "rtn-w3-g128")}
    run = SyntheticRun(
        tmp_path,
        test=100,
        general=0,
        measured=False,
        shapes=shapes,
        drop_rows=frozenset({"gptq-w4-g128"}),
        nan_rows=frozenset({"rtn-w3-g128"}),
    )
    report = evaluate(read_run(run.write(), tmp_path))
    dev = report["dev"]
    assert dev is not None
    assert "same rows" in dev["arms"]["gptq-w4-g128"]["differences"]["loss"]["reason"]
    assert dev["arms"]["gptq-w4-g128"]["metrics"]["loss"]["value"] is not None
    assert "not finite" in dev["arms"]["rtn-w3-g128"]["differences"]["loss"]["reason"]
    assert "no finite score" in dev["arms"]["rtn-w3-g128"]["metrics"]["loss"]["reason"]
    text = markdown(report)
    assert "Not there: gptq-w4-g128" in text and "Not there: rtn-w3-g128" in text
    assert "not scored on the same rows" in page(report, {})


def test_plain_texts_have_a_loss_and_no_task(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, test=60, general=0, measured=False, prompts=False, shapes=FEW)
    report = evaluate(read_run(run.write(), tmp_path))
    assert report["dev"] is not None and list(report["dev"]["arms"]["base"]["metrics"]) == ["loss"]
    assert HEADING in markdown(report) and HEADING in page(report, {})


def test_a_run_without_scores_of_dev_has_no_section(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path, test=60, general=0, measured=False, shapes=FEW).write()
    for path in tables(tmp_path).values():
        table = pd.read_parquet(path)
        table[table["split"] != "dev"].to_parquet(path)
    report = evaluate(read_run(folder, tmp_path))
    assert report["dev"] is None
    assert HEADING not in markdown(report) and HEADING not in page(report, {})


def test_the_section_stands_alone_and_says_what_it_is_for(report: dict[str, Any]) -> None:
    assert "for tuning; nothing here was promoted by" in HEADING
    # The gate names the candidate on dev (flows/gate/candidate.py): the words must not contradict that.
    assert "they choose checkpoint, merge and candidate" in lead(report["dev"])
    assert "decided on test" in lead(report["dev"])
    cell = report["dev"]["arms"]["base"]["metrics"]["loss"]
    loss = value_text("loss", cell["value"], cell["ci95"])
    for text, heads in ((markdown(report), r"\n## "), (page(report, {}), r"<h2")):
        sections = [part for part in re.split(heads, text) if HEADING in part]
        (section,) = sections
        assert loss in section and "for tuning" not in text.replace(section, "")
        for slug in FEW:
            assert slug in section
        # No table has both: the section names no metric of test, and dev's loss is in no other section.
        for named in ("perplexity", "general ppl", "top-1"):
            assert named not in section


def test_what_was_not_decoded_says_so(tmp_path: Path) -> None:
    """In words, in every form; a task score is neither made up nor left as an empty cell."""
    run = SyntheticRun(
        tmp_path, test=100, general=0, measured=False, shapes=FEW, undecoded=frozenset({"base", "nf4-adapter"})
    )
    folder = run.write()
    report = json.loads(json.dumps(evaluate(read_run(folder, tmp_path))))
    arms = report["dev"]["arms"]
    for slug in FEW:
        cells, differences = arms[slug]["metrics"], arms[slug]["differences"]
        if slug in run.undecoded:
            assert (cells["task"]["value"], cells["task"]["reason"]) == (None, NOT_DECODED)
            assert (differences["task"]["difference"], differences["task"]["reason"]) == (None, NOT_DECODED)
        else:
            assert cells["task"]["value"] is not None and differences["task"]["difference"] is not None
        assert cells["loss"]["value"] is not None and differences["loss"]["difference"] is not None
        assert report["arms"][slug]["metrics"]["task"]["n"] == 100  # of test
    lines = [line for line in markdown(report).splitlines() if NOT_DECODED in line]
    assert lines == [f"Not there: base, nf4-adapter: {NOT_DECODED}."]
    html = page(report, {})
    assert lines[0] in re.sub(r"<[^>]+>", "", html)
    for text in (markdown(report), html):
        section = next(part for part in re.split(r"\n## |<h2", text) if HEADING in part)
        assert section.count("not decoded") == 2 * 2 + (1 if text != html else 1 + 2 * 2)  # cells, sentence, titles


def test_a_run_in_which_nothing_was_decoded_on_dev_keeps_the_column(tmp_path: Path) -> None:
    run = SyntheticRun(
        tmp_path, test=60, general=0, measured=False, shapes={"base": FEW["base"]}, undecoded=frozenset({"base"})
    )
    dev = evaluate(read_run(run.write(), tmp_path))["dev"]
    assert dev is not None and list(dev["arms"]["base"]["metrics"]) == ["task", "loss"]
    assert dev["arms"]["base"]["metrics"]["task"]["reason"] == NOT_DECODED
