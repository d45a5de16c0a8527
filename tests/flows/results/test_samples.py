"""Answers side by side: which rows are shown, how answers are grouped, how differences are marked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flows.results.read import read_run
from flows.results.samples import ANSWER_CHARS, DIFFERING, PROMPT_CHARS, ROWS, Piece, marked, samples_of
from tests.flows.synthetic_run import SHAPES, SyntheticRun

FEW = {slug: SHAPES[slug] for slug in ("base", "nf4-adapter", "merged-dequantized", "gptq-w4-g128", "rtn-w3-g128")}


def write(home: Path, **changes: Any) -> Path:
    return SyntheticRun(home, test=120, general=0, measured=False, **{"shapes": FEW, **changes}).write()


def found(home: Path, **changes: Any) -> dict[str, Any]:
    said = samples_of(read_run(write(home, **changes), home))
    assert said is not None
    return said


def tables(home: Path) -> dict[str, pd.DataFrame]:
    """Arm -> its answers on test, by row."""
    return {
        path.parents[1].name.rsplit("-", 1)[0]: pd.read_parquet(path).query("split == 'test'").set_index("row")
        for path in home.glob("store/evaluate/*/files/answers.parquet")
    }


def test_rows_where_arms_differ_come_first_and_then_any(tmp_path: Path) -> None:
    said = found(tmp_path)
    scores = pd.DataFrame({slug: table.score for slug, table in tables(tmp_path).items() if slug != "base"})
    differ = set(scores.index[scores.nunique(axis=1) > 1])
    shown = [one["row"] for one in said["chosen"]]
    assert len(differ) > DIFFERING and said["differing"] == len(differ) and said["rows"] == 120
    assert len(shown) == len(set(shown)) == ROWS
    assert set(shown[:DIFFERING]) <= differ
    for one in said["chosen"]:
        assert one["why"] == ("arms differ in score" if one["row"] in differ else "drawn")


def test_the_rows_depend_on_their_names_and_scores_alone(tmp_path: Path) -> None:
    folder = write(tmp_path)
    one = samples_of(read_run(folder, tmp_path))
    record = json.loads((folder / "steps.json").read_text())
    record["arms"].reverse()
    (folder / "steps.json").write_text(json.dumps(record))
    for path in tmp_path.glob("store/evaluate/*/files/answers.parquet"):
        pd.read_parquet(path).sample(frac=1, random_state=1).to_parquet(path)
    other = samples_of(read_run(folder, tmp_path))
    assert one is not None and other is not None and one["arms"] == other["arms"][::-1]
    assert [row["row"] for row in one["chosen"]] == [row["row"] for row in other["chosen"]]


def test_every_answer_is_the_one_that_was_scored_and_equal_ones_stand_together(tmp_path: Path) -> None:
    said, answered = found(tmp_path), tables(tmp_path)
    for one in said["chosen"]:
        arms = [slug for answer in one["answers"] for slug in answer["arms"]]
        assert sorted(arms) == sorted(FEW)
        assert len({answer["text"] for answer in one["answers"]}) == len(one["answers"])
        for answer in one["answers"]:
            for slug in answer["arms"]:
                row = answered[slug].loc[one["row"]]
                assert (row.answer, row.score) == (answer["text"], answer["score"])


def test_controls_are_left_out_and_a_failed_arm_is_missing(tmp_path: Path) -> None:
    control = replace(SHAPES["gptq-w4-g128"], calibration="random")
    problem = {"what": "NaN", "where": "layer 3", "why": "overflow", "next": "look there"}
    said = found(
        tmp_path,
        shapes={**FEW, "gptq-w4-g128.calib-random": control},
        broken={"evaluate/merged-dequantized": problem},
    )
    assert said["arms"] == ["base", "nf4-adapter", "gptq-w4-g128", "rtn-w3-g128"]


def test_plain_texts_have_no_samples(tmp_path: Path) -> None:
    assert samples_of(read_run(write(tmp_path, prompts=False), tmp_path)) is None


def test_long_texts_are_cut_where_it_hurts_least(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for path in tmp_path.glob("store/evaluate/*/files/answers.parquet"):
        table = pd.read_parquet(path)
        table["prompt"] = "x" * PROMPT_CHARS + "the question"
        table["answer"] = "the answer" + "y" * ANSWER_CHARS
        table.to_parquet(path)
    said = samples_of(read_run(folder, tmp_path))
    assert said is not None
    one = said["chosen"][0]
    assert one["prompt"].endswith("the question") and one["prompt"].startswith("[12 characters] …")
    assert one["answers"][0]["text"].startswith("the answer")
    assert one["answers"][0]["text"].endswith("… [10 characters]")


@pytest.mark.parametrize(
    ("reference", "answer", "pieces"),
    [
        ("a > 3", "a > 3", [Piece("same", "a > 3")]),
        ("a > 3", " a > 3 ", [Piece("same", "a > 3")]),
        ("age > 3", "age >= 3", [Piece("same", "age >"), Piece("added", "="), Piece("same", " 3")]),
        ("a b c", "a c", [Piece("same", "a "), Piece("missing", "b "), Piece("same", "c")]),
        ("one two three", "nothing alike here at all", [Piece("added", "nothing alike here at all")]),
    ],
)
def test_differences_are_marked_by_words_and_signs(reference: str, answer: str, pieces: list[Piece]) -> None:
    assert marked(reference, answer) == pieces


def test_marks_give_back_both_texts() -> None:
    reference, answer = "SELECT a, b FROM t WHERE c = 1", "SELECT a FROM t WHERE c = 12 AND d"
    pieces = marked(reference, answer)
    assert "".join(one.text for one in pieces if one.kind != "missing") == answer
    assert "".join(one.text for one in pieces if one.kind != "added") == reference
