"""Which rows go on: weights of sources, domains, near-duplicates, leaks, too few rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recipes.doubles.near_duplicates import near_duplicate_turns
from tasks.runtime.process.errors import StageError
from tests.jobs.build import notes, write_jsonl
from tests.jobs.test_prepare import chat, questions, run, run_sources, source, table


def test_weights_thin_out_train_alone_and_stay_when_sources_grow(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", questions(300))
    pairs = [{"instruction": f"name {i} !", "output": f"{i} it is"} for i in range(100)]
    second = write_jsonl(tmp_path / "second.jsonl", pairs)
    whole = run_sources(tmp_path, [source(domain="a"), source(domain="b")], first, second, name="whole")
    job = run_sources(tmp_path, [source(domain="a", weight=0.4), source(domain="b")], first, second)
    before, after = ({row["row"]: row for row in table(one.out)} for one in (whole, job))
    gone = before.keys() - after.keys()
    assert {(before[name]["split"], before[name]["domain"]) for name in gone} == {("train", "a")}
    train = [row for row in before.values() if (row["split"], row["domain"]) == ("train", "a")]
    assert abs(1 - len(gone) / len(train) - 0.4) < 0.15  # 4 standard deviations of a share of 180 draws
    assert json.loads((job.out / "summary.json").read_text())["not_drawn_rows"] == len(gone)
    assert f"{len(train) - len(gone)} of {len(train)} from first.jsonl (0.4)" in notes(job)["weights"]
    assert "messages, detected from" in notes(job)["format"] and "alpaca, detected from" in notes(job)["format"]
    write_jsonl(first, questions(400))
    grown = run_sources(tmp_path, [source(domain="a", weight=0.4), source(domain="b")], first, second, name="grown")
    assert {name: row["split"] for name, row in after.items()}.items() <= {
        row["row"]: row["split"] for row in table(grown.out)
    }.items()


def test_malformed_rows_of_every_source_are_named_at_once(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(write_jsonl(tmp_path / name / "rows.jsonl", [*questions(2), {"messages": []}]))
    with pytest.raises(StageError, match="2 malformed") as refused:
        run_sources(tmp_path, [source(), source()], *paths)
    assert "one/rows.jsonl:3 " in refused.value.problem.why and "two/rows.jsonl:3 " in refused.value.problem.why


def test_a_source_with_a_domain_needs_no_column(tmp_path: Path) -> None:
    named = write_jsonl(tmp_path / "named.jsonl", [row | {"kind": "k"} for row in questions(60)])
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": f"say {i}", "completion": "x"} for i in range(60)])
    job = run_sources(tmp_path, [source(), source(domain="own")], named, plain, domain="kind")
    assert {row["domain"] for row in table(job.out)} == {"k", "own"}
    with pytest.raises(StageError, match="has no `kind`"):
        run_sources(tmp_path, [source(), source()], named, plain, name="again", domain="kind")


STORY = "the old man went down to the harbour in the morning and looked for a boat that would carry him over the bay "


def almost(number: int, *, of: int) -> dict[str, Any]:
    """A row of 115 words; those of one `of` differ in their last word alone, so 113 of 115 5-grams are the same."""
    words = " ".join(f"{word}{of}.{place}" for place, word in enumerate((STORY * 5).split()))
    return {"messages": chat(words, f"it is {number}")}


def test_near_duplicates_are_counted_and_removed_so_that_no_test_row_goes(tmp_path: Path) -> None:
    rows = [*questions(60), *(almost(number, of=of) for of in range(8) for number in range(6))]
    data = write_jsonl(tmp_path / "rows.jsonl", [row | {"number": number} for number, row in enumerate(rows)])
    options = {"max_length": 4000, "group": "number"}  # by their first question all that are alike were on one side
    jobs = {
        mode: run_sources(tmp_path, [source()], data, name=mode, near_duplicates=mode, **options)
        for mode in ("ignore", "count", "remove")
    }
    tables = {mode: {row["row"]: row for row in table(job.out)} for mode, job in jobs.items()}
    counts = {mode: json.loads((job.out / "summary.json").read_text()) for mode, job in jobs.items()}
    assert tables["ignore"] == tables["count"] and "near_duplicates" not in counts["ignore"]
    counted = counts["count"]["near_duplicates"]
    assert (counted["rows"], counted["removed"]) == (8 * 5, 0)  # of six that are alike one is the first
    assert counted["rows"] == counted["train"] + counted["dev"] + counted["test"] and counted["across_sides"] > 0
    gone = tables["count"].keys() - tables["remove"].keys()
    assert len(gone) == counts["remove"]["near_duplicates"]["removed"] == counted["train"] + counted["dev"]
    assert all(tables["count"][name]["split"] != "test" for name in gone)
    stories = {}
    for row in tables["remove"].values():
        if len(row["input_ids"]) > 100:
            stories.setdefault(json.loads(row["messages"])[0]["content"], []).append(row["split"])
    assert len(stories) == 8  # each is still there, on one side only
    assert all(set(sides) == {"test"} or len(sides) == 1 for sides in stories.values())
    assert "resemble a row of another side" in notes(jobs["count"])["near-duplicates"]


def test_a_system_turn_that_all_rows_share_makes_no_near_duplicates(tmp_path: Path) -> None:
    rows = [{"messages": chat(f"what is {i} ?", f"it is {i}", system=STORY * 5)} for i in range(90)]
    summary = json.loads((run(tmp_path, rows, max_length=4000) / "summary.json").read_text())
    assert summary["near_duplicates"]["rows"] == 0


def test_fewer_than_32_rows_of_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="train has 25 rows; at least 32 are needed") as refused:
        run(tmp_path, questions(40))
    assert "Give about 54 rows or more" in refused.value.problem.next


def test_leaks_are_counted_said_and_left_to_rehearse(tmp_path: Path) -> None:
    rows = [*questions(60), *(almost(number, of=of) for of in range(8) for number in range(6))]
    data = write_jsonl(tmp_path / "rows.jsonl", [row | {"number": number} for number, row in enumerate(rows)])
    options = {"max_length": 4000, "group": "number"}
    jobs = {
        mode: run_sources(tmp_path, [source()], data, name=mode, near_duplicates=mode, **options)
        for mode in ("ignore", "count", "remove")
    }
    leaks = {mode: json.loads((job.out / "summary.json").read_text()).get("leaks") for mode, job in jobs.items()}
    assert leaks["ignore"] is None and "not looked for" in notes(jobs["ignore"])["leaks"]
    assert leaks["count"]["twins"] == leaks["count"]["rows"] > 10 and leaks["remove"]["rows"] == 0
    train = [row for row in table(jobs["count"].out) if row["split"] == "train"]
    assert leaks["count"]["train"] == len(train)
    first = leaks["count"]["examples"].splitlines()[1].split()
    columns = pq.read_table(jobs["count"].out / "rows.parquet", columns=["source", "split"])
    sides = dict(zip(columns["source"].to_pylist(), columns["split"].to_pylist(), strict=True))
    assert first[1] == "like" and sides[first[0]] == "train" and sides[first[2]] in ("dev", "test")


@pytest.mark.parametrize(("jaccard", "expected"), [(0.9, True), (0.99, False)])
def test_the_limit_is_the_exact_jaccard_similarity(jaccard: float, expected: bool) -> None:
    rows = {str(i): almost(i, of=0)["messages"] for i in range(2)}
    # 115 + 3 words give 114 5-grams, of which the last one differs: 113 / 115 = 0.983.
    pairs = near_duplicate_turns(rows, {"0": "test", "1": "train"}, jaccard=jaccard).pairs
    assert [(pair.row, pair.like) for pair in pairs] == ([("1", "0")] if expected else [])
