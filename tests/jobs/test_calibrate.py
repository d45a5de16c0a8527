"""Calibration set: from train only, in the domains' proportions, whole rows, the same bytes every time."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.rows import content_hash
from tasks.jobs import calibrate
from tasks.jobs.prepare import ROWS
from tasks.runtime.errors import StageError
from tests.jobs.build import make_job

PARAMS = {"rows": 128, "seq_len": 64, "stratify": "proportional", "seed": 0, "min_tokens": 0}
SIZES = {"few": 40, "some": 110, "many": 250}


def record(number: int, *, split: str, domain: str, length: int) -> dict[str, Any]:
    """A row of rows.parquet; its tokens are its number and then its positions."""
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "yes"}]
    return {
        "row": content_hash(messages)[:16],
        "group": str(number),
        "split": split,
        "domain": domain,
        "messages": json.dumps(messages),
        "input_ids": [number, *range(length - 1)],
        "completion_mask": [False] * (length - 1) + [True],
        "prompt_ids": [number],
        "answer": "yes",
        "columns": "{}",
        "dropped_turns": 0,
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), folder / "rows.parquet")
    return folder


def dataset_rows(*, longest: int = 60) -> list[dict[str, Any]]:
    """400 train rows of three domains, 30 dev and 30 test rows, of 8 to `longest` tokens."""
    draw = random.Random(0)
    domains = [domain for domain, size in SIZES.items() for _ in range(size)]
    train = [record(i, split="train", domain=one, length=draw.randint(8, longest)) for i, one in enumerate(domains)]
    held = [record(1000 + i, split=("dev", "test")[i % 2], domain="many", length=20) for i in range(60)]
    return train + held


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "dataset", dataset_rows())


def run(dataset: Path, out: Path, **params: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = calibrate.run(make_job("calibrate", out, params=PARAMS | params, dataset=dataset))
    return summary, pq.read_table(out / "calibset.parquet").to_pylist()


def test_rows_are_whole_from_train_and_fit(dataset: Path, tmp_path: Path) -> None:
    summary, sequences = run(dataset, tmp_path / "out")
    rows = {row["row"]: row for row in pq.read_table(dataset / "rows.parquet").to_pylist()}
    drawn = [name for sequence in sequences for name in sequence["rows"]]
    assert len(drawn) == len(set(drawn)) == 128
    assert {rows[name]["split"] for name in drawn} == {"train"}
    for sequence in sequences:
        assert sequence["input_ids"] == [token for name in sequence["rows"] for token in rows[name]["input_ids"]]
        assert len(sequence["input_ids"]) <= PARAMS["seq_len"]
    assert summary["tokens"] == sum(len(sequence["input_ids"]) for sequence in sequences)
    assert summary["fill"] > 0.9  # first-fit decreasing of 8 to 60 tokens into 64; in drawn order it is about 0.75
    preview = (tmp_path / "out" / "preview.md").read_text()
    assert preview.count("## ") == 5
    assert "question" in preview


@pytest.mark.parametrize(
    ("stratify", "expected"),
    [
        ("proportional", {"few": 13, "some": 35, "many": 80}),  # 12.8, 35.2, 80.0: the largest remainder is few's
        ("equal", {"few": 40, "some": 44, "many": 44}),  # few holds only 40 of its 42.7; the rest goes to the others
    ],
)
def test_domains_get_their_shares(dataset: Path, tmp_path: Path, stratify: str, expected: dict[str, int]) -> None:
    summary, _ = run(dataset, tmp_path / "out", stratify=stratify)
    assert summary["domains"] == expected


def test_allot_gives_all_and_never_more_than_there_is() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sizes = {f"d{i}": draw.randint(0, 40) for i in range(draw.randint(1, 8))}
        total = draw.randint(0, sum(sizes.values()))
        given = calibrate.allot(sizes, total=total, equal=draw.random() < 0.5)
        assert sum(given.values()) == total
        assert all(given[name] <= sizes[name] for name in sizes)


def test_the_same_inputs_give_the_same_bytes_and_another_seed_does_not(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "a")
    run(dataset, tmp_path / "b")
    run(dataset, tmp_path / "c", seed=1)
    first, second, third = ((tmp_path / name / "calibset.parquet").read_bytes() for name in "abc")
    assert first == second != third


def test_rows_over_seq_len_are_left_out_and_counted(dataset: Path, tmp_path: Path) -> None:
    summary, sequences = run(dataset, tmp_path / "out", seq_len=40)
    long = sum(len(row["input_ids"]) > 40 for row in dataset_rows() if row["split"] == "train")
    assert summary["too_long_rows"] == long > 0
    assert sum(len(sequence["rows"]) for sequence in sequences) == 128


def test_too_few_rows_are_refused_with_what_would_do(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as refused:
        run(dataset, tmp_path / "out", rows=500)
    assert "400" in refused.value.problem.next


def test_too_few_rows_below_the_least(tmp_path: Path) -> None:
    small = write(tmp_path / "dataset", [row for row in dataset_rows() if row["domain"] != "many"][:100])
    with pytest.raises(StageError) as refused:
        run(small, tmp_path / "out")
    assert "give more training rows" in refused.value.problem.next


def test_too_few_tokens_are_refused_with_the_number_that_would_do(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as refused:
        run(dataset, tmp_path / "out", min_tokens=8000)
    needed = int(refused.value.problem.next.rpartition(" ")[2])
    summary, _ = run(dataset, tmp_path / "again", min_tokens=0, rows=needed)
    assert summary["tokens"] == pytest.approx(8000, rel=0.05)  # rows differ in length, so N is an estimate


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_train_row_that_is_in_dev_or_test_is_refused(tmp_path: Path, split: str) -> None:
    rows = dataset_rows()
    copy = dict(rows[7], split=split, row="another name", input_ids=[1, 2, 3])
    copy["messages"] = copy["messages"].replace("question 7", "question  7 ")  # equal once normalised
    with pytest.raises(StageError) as refused:
        run(write(tmp_path / "dataset", [*rows, copy]), tmp_path / "out")
    assert rows[7]["row"] in refused.value.problem.where


def test_the_fixture_holds_what_the_shares_are_computed_from() -> None:
    assert Counter(row["domain"] for row in dataset_rows() if row["split"] == "train") == SIZES
