"""Rows added, removed and edited, counted by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.retrain.row_changes import Changes, Rows, count, load, rows_of, save
from recipes.data.origin import origins
from recipes.data.schema import Data


def row(number: int, answer: str = "blue", *, domain: str = "colour", **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "completion": answer, "domain": domain, "id": number, **more}


def read(folder: Path, *files: list[dict[str, Any]], group: str | None = "id", domain: str | None = "domain") -> Rows:
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(files):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    asked = Data(path="unread", group=group, domain=domain)
    return rows_of(origins([folder], [asked.parts[0].model_dump()], domain=domain, group=group), asked)


def changes(before: Rows, now: Rows) -> dict[str, dict[str, int]]:
    return asdict(count(before, now))


def test_rows_are_counted_by_domain(tmp_path: Path):
    before = read(tmp_path / "a", [row(1), row(2), row(3, domain="number"), row(4, domain="number")])
    now = read(tmp_path / "b", [row(1), row(2, "green"), row(4, domain="number")], [row(5), row(6), row(7, domain="x")])
    assert changes(before, now) == {"added": {"colour": 2, "x": 1}, "removed": {"number": 1}, "edited": {"colour": 1}}
    assert str(count(before, now)) == (
        "rows 3 added, 1 removed, 1 edited (colour: 2 added, 1 edited; number: 1 removed; x: 1 added)"
    )


def test_order_files_format_and_copies_are_no_change(tmp_path: Path):
    rows = [row(number) for number in range(6)]
    before = read(tmp_path / "a", rows)
    now = read(tmp_path / "b", rows[3:], [*reversed(rows)])
    assert changes(before, now) == {"added": {}, "removed": {}, "edited": {}} and not count(before, now)
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    asked = Data(path="unread", group="id", domain="domain")
    source = origins([tmp_path / "c.csv"], [asked.parts[0].model_dump()], domain="domain", group="id")
    turns = {name: one[:2] for name, one in rows_of(source, asked).items()}
    assert turns == {name: one[:2] for name, one in before.items()}


def test_without_a_group_another_answer_to_a_question_is_an_edit(tmp_path: Path):
    before = read(tmp_path / "a", [row(1), row(2)], group=None)
    now = read(tmp_path / "b", [row(1), row(2, "green")], group=None)
    assert changes(before, now) == {"added": {}, "removed": {}, "edited": {"colour": 1}}


def test_other_columns_and_another_domain_of_the_same_turns_are_edits(tmp_path: Path):
    before = read(tmp_path / "a", [row(1, db="shop"), row(2, db="shop"), row(3)], group=None)
    now = read(tmp_path / "b", [row(1, db="clinic"), row(2, db="shop"), row(3, domain="number")], group=None)
    assert changes(before, now) == {"added": {}, "removed": {}, "edited": {"colour": 1, "number": 1}}


def test_a_coarse_group_makes_as_many_pairs_as_there_are(tmp_path: Path):
    before = read(tmp_path / "a", [row(number, customer="x") for number in (1, 2, 3)], group="customer", domain=None)
    now = read(tmp_path / "b", [row(number, customer="x") for number in (3, 4, 5, 6)], group="customer", domain=None)
    assert changes(before, now) == {"added": {"": 1}, "removed": {}, "edited": {"": 2}}
    assert str(count(before, now)) == "rows 1 added, 2 edited"


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    rows = read(tmp_path / "a", [row(1), row(2, "grün", domain="für")])
    save(rows, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet") == rows
    save({}, tmp_path / "none.parquet")
    assert load(tmp_path / "none.parquet") == {}


def test_many_domains_are_not_all_named():
    text = str(Changes(added={f"d{number}": number for number in range(1, 9)}, removed={}, edited={}))
    assert text.startswith("rows 36 added (d8: 8 added; d7") and text.endswith("; and 3 domains more)")
