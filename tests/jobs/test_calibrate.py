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

from recipes.data.rows import content_hash
from tasks.jobs import calibrate
from tasks.jobs.prepare import ROWS
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, notes

PARAMS = {
    "rows": 128,
    "allow_unusual_size": None,
    "seq_len": 64,
    "stratify": "proportional",
    "max_near_duplicates": 0.01,
    "seed": 0,
    "min_tokens": 0,
}
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


def test_given_shares_are_kept_exactly(dataset: Path, tmp_path: Path) -> None:
    summary, _ = run(dataset, tmp_path / "out", stratify={"few": 0.25, "many": 0.75})
    assert summary["domains"] == {"few": 32, "many": 96, "some": 0}
    with pytest.raises(StageError, match="asks for 64 of few, which has 40"):
        run(dataset, tmp_path / "over", stratify={"few": 0.5, "many": 0.5})
    with pytest.raises(StageError, match="1 of none, which has 0"):
        run(dataset, tmp_path / "unknown", stratify={"many": 0.99, "none": 0.01})


def test_short_middle_and_long_rows_of_a_domain_come_in_equal_parts(dataset: Path, tmp_path: Path) -> None:
    """Of a plain sample of 44 the thirds would differ by more than one row nine times in ten."""
    for seed in range(3):
        _, sequences = run(dataset, tmp_path / str(seed), stratify="equal", seed=seed)
        drawn = {name for sequence in sequences for name in sequence["rows"]}
        rows = [row for row in dataset_rows() if row["split"] == "train" and row["domain"] == "many"]
        candidates = [calibrate.DrawableRow(row["row"], "many", row["messages"], row["input_ids"]) for row in rows]
        thirds = calibrate.by_length(candidates)
        assert [len(third) for third in thirds.values()] == [83, 83, 84]
        assert max(len(row.input_ids) for row in thirds["short"]) <= min(len(row.input_ids) for row in thirds["middle"])
        counts = [sum(row.row in drawn for row in third) for third in thirds.values()]
        assert sum(counts) == 44 and max(counts) - min(counts) <= 1


def test_an_unusual_size_needs_a_reason_and_tells_it(dataset: Path, tmp_path: Path) -> None:
    job = make_job(
        "calibrate",
        tmp_path / "out",
        params=PARAMS | {"rows": 40, "allow_unusual_size": "to see what few rows cost"},
        dataset=dataset,
    )
    assert calibrate.run(job)["rows"] == 40
    assert notes(job)["unusual size"] == "calibrate.rows is 40: to see what few rows cost"


def test_allot_gives_all_and_never_more_than_there_is() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sizes = {f"d{i}": draw.randint(0, 40) for i in range(draw.randint(1, 8))}
        total = draw.randint(0, sum(sizes.values()))
        weights = sizes if draw.random() < 0.5 else {name: draw.random() + 0.01 for name in sizes}
        shares = calibrate.allot(sizes, total=total, weights=weights)
        assert sum(shares.values()) == total
        assert all(shares[name] <= sizes[name] for name in sizes)


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


WORDS = ["how", "many", "books", "by", "authors", "from", "Norway", "were", "sold", "in", "the", "last", "year"]


def twin(row: dict[str, Any], change: int, *, split: str, name: str) -> dict[str, Any]:
    """The row with 13 words asked and 7 answered, of the question the last `change` ones replaced: 16 word 5-grams."""
    question = " ".join([*WORDS[: len(WORDS) - change], *(f"{name}{i}" for i in range(change))])
    messages = [{"role": "system", "content": f"system {name}"}, {"role": "user", "content": question}]
    messages += [{"role": "assistant", "content": "SELECT count ( * ) FROM books"}]
    return dict(row, row=name, split=split, messages=json.dumps(messages), input_ids=[9, *row["input_ids"][1:], change])


def test_near_twins_of_dev_and_test_are_listed_and_too_many_refused(tmp_path: Path) -> None:
    rows = [row for row in dataset_rows() if row["split"] != "train" or row["domain"] != "few"]
    spare = next(row for row in dataset_rows() if row["domain"] == "few")
    held = twin(spare, 0, split="dev", name="held")
    near = twin(spare, 0, split="train", name="near")  # another system turn only: 1.0
    near["input_ids"] = [8, *near["input_ids"][1:]]
    far = twin(spare, 1, split="train", name="far")  # five of the 16 grams are others: 11 / 21
    data = write(tmp_path / "dataset", [*rows, held, near, far])
    params = PARAMS | {"stratify": {"few": 2 / 128, "many": 126 / 128}}  # both are drawn: few has only them
    job = make_job("calibrate", tmp_path / "out", params=params, dataset=data)
    assert calibrate.run(job)["near_twins"] == 1  # of 128, 1 is allowed
    listed = [json.loads(line) for line in (tmp_path / "out" / "near_twins.jsonl").read_text().splitlines()]
    assert listed == [{"row": "near", "like": "held", "split": "dev"}]
    assert notes(job)["near-twins"].endswith("1.00% are allowed: near like held of dev")
    with pytest.raises(StageError, match="1 of 128 rows are near-twins") as refused:
        run(data, tmp_path / "refused", **{**params, "max_near_duplicates": 0.005})
    assert "data.group" in refused.value.problem.next and "near like held of dev" in refused.value.problem.why


def test_near_duplicates_within_train_are_drawn_once(tmp_path: Path) -> None:
    rows = dataset_rows()
    copies = [twin(rows[0], 0, split="train", name=f"copy{i}") for i in range(6)]
    for i, copy in enumerate(copies):
        copy["domain"], copy["input_ids"] = "copies", [2000 + i, 1, 2, 3]
    data = write(tmp_path / "dataset", [*rows, *copies])
    summary, sequences = run(data, tmp_path / "out", rows=401, allow_unusual_size=None)
    assert summary["near_duplicate_rows"] == 5 and summary["domains"]["copies"] == 1
    assert [name for sequence in sequences for name in sequence["rows"] if name.startswith("copy")] == ["copy0"]
    with pytest.raises(StageError, match="train has 401 distinct ones"):
        run(data, tmp_path / "all", rows=402)


def test_the_fixture_holds_what_the_shares_are_computed_from() -> None:
    assert Counter(row["domain"] for row in dataset_rows() if row["split"] == "train") == SIZES
