"""Answers without an end: in the gate's words, in the table of arms, and of runs that did not count them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.report.build import evaluate
from flows.report.html import page
from flows.report.text import arm_rows, markdown
from flows.results.read import read_run
from tests.flows.synthetic_run import SHAPES, Serving, SyntheticRun

FLOOR, ARM = "merged-dequantized", "gptq-w4-g128"
SHAPED = {name: SHAPES[name] for name in ("base", "nf4-adapter", FLOOR)}
SHAPED[ARM] = replace(SHAPES[ARM], task=0.905, kl=5e-4, loss=7e-4)


def reported(home: Path, *, without: str = "", **changes: Any) -> dict[str, Any]:
    """The report of a run; `without`: the arm that an older version scored."""
    folder = SyntheticRun(home, shapes=SHAPED, test=1200, general=20, **changes).write()
    for path in home.glob(f"store/evaluate/{without}-????????????/files/scores.parquet") if without else ():
        table = pq.read_table(path)
        pq.write_table(table.filter(pc.not_equal(table["metric"], "truncated")), path)
    report: Any = evaluate(read_run(folder, home))
    return report


def test_the_candidates_share_stands_in_the_gate(tmp_path: Path) -> None:
    report = reported(tmp_path, cut={ARM: 9, FLOOR: 6})
    assert report["gate"]["candidate"] == ARM
    cut = report["gate"]["truncated"]
    assert (cut["answers"], cut["n"], cut["share"]) == (9, 1200, 0.0075)
    (said,) = [line for line in report["gate"]["text"] if "no end" in line]
    assert said.startswith("9 of its 1,200 answers on test (0.8 %) have no end and score 0")
    assert said in markdown(report) and said in page(report, {})
    assert report["gate"]["text"].index(said) > 0  # the outcome comes first
    shares = {slug: arm["metrics"]["truncated"]["value"] for slug, arm in report["arms"].items()}
    assert shares == {"base": 0, "nf4-adapter": 0, FLOOR: 0.005, ARM: 0.0075}
    low, high = report["arms"][ARM]["metrics"]["truncated"]["ci95"]
    assert 0 < low < 0.0075 < high < 0.03
    column = {row["arm"]: row["cut off"] for row in arm_rows(report)}
    assert column[ARM].startswith("0.75 [") and column["base"].startswith("0.00 [0.00, ")
    assert "cut off % ↓" in markdown(report)


def test_where_every_answer_ends_nothing_is_said(tmp_path: Path) -> None:
    report = reported(tmp_path)
    assert "truncated" not in report["gate"] and not any("no end" in line for line in report["gate"]["text"])


def test_an_arm_of_an_older_version_is_not_counted(tmp_path: Path) -> None:
    report = reported(tmp_path, without=ARM)
    cell = report["arms"][ARM]["metrics"]["truncated"]
    assert cell["value"] is None and cell["reason"].startswith("not counted: ")
    assert {row["arm"]: row["cut off"] for row in arm_rows(report)}[ARM] == "not counted"
    assert ">not counted</td>" in page(report, {})
    assert report["arms"][ARM]["ranked"] and report["gate"]["candidate"] == ARM
    assert report["arms"]["base"]["metrics"]["truncated"]["value"] == 0


def test_plain_texts_have_no_answers_to_cut_off(tmp_path: Path) -> None:
    cell = reported(tmp_path, prompts=False)["arms"][ARM]["metrics"]["truncated"]
    assert cell["reason"] == "no row of test has a prompt to answer"


def test_the_engines_share_is_counted_too(tmp_path: Path) -> None:
    report = reported(tmp_path, serving={FLOOR: Serving(), ARM: Serving()})
    assert report["served"]["arms"][ARM]["metrics"]["served_truncated"]["value"] == 0
    for path in tmp_path.glob(f"store/serve/{ARM}-????????????/files/scores.parquet"):
        lines = pq.read_table(path).to_pylist()
        first = [line for line in lines if line["metric"] == "served_truncated"][:6]
        for line in first:
            line["sum"] = 1.0
        pq.write_table(pq.read_table(path).from_pylist(lines), path)
    (run,) = (tmp_path / "runs").iterdir()
    arm: Any = evaluate(read_run(run, tmp_path))["served"]
    assert any("; 6 have no end and score 0" in line for line in arm["text"])
