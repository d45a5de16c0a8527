"""rows.parquet: the same rows whatever the number of processes, in row groups, equal records once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recipes.data.rows import read_rows, side
from tasks.jobs import prepare
from tasks.jobs.preparing import writing
from tasks.jobs.text.conversation import Conversation
from tasks.jobs.text.rendering import Renderer, Sample
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_prepare import PARAMS, chat, questions, run, table
from tests.tiny import write_base


def mixture() -> list[dict[str, Any]]:
    """Rows of one question, of several, cut ones, texts and doubles."""
    rows: list[dict[str, Any]] = questions(2400)
    rows += [{"messages": chat(f"first {i} ?", "yes", f"second {i} ?", f"no {i}", system="short")} for i in range(150)]
    rows += [{"messages": chat("abc " * 30 + str(i), "x", f"and {i % 5} ?", f"the same {i % 5}")} for i in range(40)]
    rows += [{"messages": chat(f"long {i} ?", "z" * 200)} for i in range(5)]
    return [*rows, *questions(40)]


def test_streaming_writes_what_a_plain_loop_gives(tmp_path: Path) -> None:
    dataset = run(tmp_path, mixture(), max_length=64, near_duplicates="ignore")
    renderer, expected, seen, cut = Renderer.open(tmp_path / "base"), {}, set(), 0
    rows = {row.name: row for row in reversed(read_rows(tmp_path / "out.jsonl").rows)}
    sides = {name: side(row.question, salt="", dev=0.2, test=0.2) for name, row in rows.items()}
    for name in sorted(rows, key=lambda name: (("test", "dev", "train").index(sides[name]), name)):
        (sample,) = renderer.samples(Conversation.of(rows[name].messages), max_length=64)
        ids = tuple(sample.rendered.input_ids) if isinstance(sample, Sample) else None
        if isinstance(sample, Sample) and ids not in seen:
            expected[name] = (sides[name], ids, tuple(sample.rendered.mask), tuple(sample.rendered.prompt_ids))
            cut += sample.dropped > 0
        seen.add(ids)
    columns = ("split", "input_ids", "completion_mask", "prompt_ids")
    written = table(dataset)
    made = {
        row["row"]: tuple(tuple(value) if isinstance(value, list) else value for value in map(row.get, columns))
        for row in written
    }
    assert made == expected and len(made) == 2400 + 150 + 5
    assert [(row["split"], row["row"]) for row in written] == sorted((row["split"], row["row"]) for row in written)
    summary = json.loads((dataset / "summary.json").read_text())
    assert summary["rows"] == {
        name: list(sides[row] for row in made).count(name) for name in ("train", "dev", "test")
    } | {"general": 0}
    assert summary["completion_tokens"] == {
        name: sum(sum(row["completion_mask"]) for row in written if row["split"] == name)
        for name in ("train", "dev", "test")
    }
    assert (summary["duplicates"], summary["too_long_rows"], summary["truncated_rows"]) == (40 + 35, 5, cut)
    assert not list(dataset.glob("scratch-*"))


def test_more_processes_write_the_same_bytes(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", mixture())
    base = write_base(tmp_path / "base")
    written = []
    for threads in (1, 2):
        job = make_job(
            "prepare", tmp_path / str(threads), params=PARAMS | {"max_length": 64}, data=data, tokenizer=base
        )
        prepare.run(replace(job, execution=replace(job.execution, threads=threads)))
        written.append([(job.out / name).read_bytes() for name in ("rows.parquet", "summary.json")])
        assert "⟦" in notes(job)["example"]
    assert written[0] == written[1]


def test_rows_parquet_has_row_groups_that_a_reader_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_ROWS", 500)
    file = pq.ParquetFile(run(tmp_path, questions(2400), near_duplicates="ignore") / "rows.parquet")
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sum(sizes) == 2400 and len(sizes) > 3 and max(sizes) < 1000


def test_equal_texts_on_two_sides_stay_on_the_held_out_one(tmp_path: Path) -> None:
    rows = [row | {"thread": f"a{i}", "schema": "x"} for i, row in enumerate(questions(60))]
    rows += [row | {"thread": f"b{i}", "schema": "y"} for i, row in enumerate(questions(60))]
    dataset = run(tmp_path, rows, group="thread", scored_columns=["schema"])
    kept: dict[str, set[str]] = {}
    for row in table(dataset):
        kept.setdefault(row["answer"], set()).add(row["split"])
    assert len(kept) == 60 and all(len(sides) == 1 for sides in kept.values())
    assert 60 < len(table(dataset)) < 120  # where both fall on one side, both stay
