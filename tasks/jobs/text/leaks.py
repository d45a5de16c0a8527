"""Weights must not be calibrated on what they are judged by: rows of train that are, or almost are, in dev or test."""

from __future__ import annotations

import json
import math
from array import array
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa

from recipes.data.rows import Side, normalised
from recipes.data.turns import Message
from recipes.doubles.near_duplicates import near_duplicate_turns, not_all_compared
from recipes.doubles.search import LEAK
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

SHOWN = 20
TWINS = "near_twins.jsonl"


class HeldOut(NamedTuple):
    """Rows of dev and test: split and turns of each by name."""

    splits: Mapping[str, str]
    turns: Mapping[str, Sequence[Message]]


class StoredTurns(Mapping[str, list[Message]]):
    """Turns by name of a row. They stay JSON text in an Arrow column: each is read when it is asked for."""

    def __init__(self, messages: pa.ChunkedArray, places: Mapping[str, int]) -> None:
        self._messages, self._places = messages, places

    def __getitem__(self, name: str) -> list[Message]:
        return json.loads(self._messages[self._places[name]].as_py())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def refuse_leaks(train: pa.Table, held: pa.Table, *, path: Path) -> None:
    """Raise StageError where a row of train, by hash, text or tokens, is in dev or test."""
    seen = {key for row in _rows(held) for key in _keys(row)}
    leaked = [row["row"] for row in _rows(train) if not seen.isdisjoint(_keys(row))]
    if leaked:
        raise StageError.of(
            what=f"{len(leaked)} row(s) of train are in dev or test, too",
            where=f"{path}, rows {', '.join(leaked[:SHOWN])}",
            why="weights would be calibrated on what they are judged by",
            next="make the dataset again with quench run; prepare removes duplicates",
        )


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.select(["row", "messages", "input_ids"]).to_batches(max_chunksize=1000):
        yield from batch.to_pylist()


def _keys(row: dict[str, Any]) -> list[bytes]:
    """Name, text and tokens as 16 bytes each."""
    tokens = array("i", row["input_ids"]).tobytes()
    parts = (row["row"].encode(), normalised(json.loads(row["messages"])).encode(), tokens)
    return [blake2b(part, digest_size=16).digest() for part in parts]


def without_near_duplicates(rows: Mapping[str, Sequence[Message]]) -> list[str]:
    """Names of the rows, in their order, without those that are almost equal to an earlier one that stays."""
    pairs = near_duplicate_turns(rows, dict.fromkeys(rows, "train"), jaccard=LEAK).pairs
    repeated = {pair.row for pair in pairs}
    return [name for name in rows if name not in repeated]


def near_twins(drawn: Mapping[str, Sequence[Message]], held: HeldOut, *, most: float, job: Job) -> int:
    """Count, list and note drawn rows that are almost equal to a row of dev or test.

    Args:
        drawn: Turns by name.
        held: Rows of dev and test.
        most: Share of the drawn rows that may be.
        job: Gets near_twins.jsonl and notes.

    Raises:
        StageError: They are more than that.
    """
    sides: dict[str, Side] = dict.fromkeys(held.splits, "test")  # each of them is compared, whatever is near it
    for name in drawn:
        sides[name] = "train"
    turns = ChainMap(dict(drawn), cast("dict[str, Sequence[Message]]", held.turns))
    pairs, limited = near_duplicate_turns(turns, sides, jaccard=LEAK)
    twins = sorted((pair.row, pair.like) for pair in pairs if pair.row in drawn and pair.like in held.splits)
    lines = [json.dumps({"row": row, "like": like, "split": held.splits[like]}) + "\n" for row, like in twins]
    (job.out / TWINS).write_text("".join(lines), encoding="utf-8")
    examples = ", ".join(f"{row} like {like} of {held.splits[like]}" for row, like in twins[:SHOWN])
    share = f"{len(twins)} of {len(drawn)} rows are near-twins of a row of dev or test (Jaccard >= {LEAK:g})"
    if len(twins) > most * len(drawn):
        raise StageError.of(
            what=share,
            where=f"calibrate.max_near_duplicates {most:g}: {math.floor(most * len(drawn))} rows",
            why=f"weights would be calibrated on what they are judged by: {examples}",
            next="name the column that keeps such rows together as data.group, or set data.near_duplicates: "
            "remove; calibrate.max_near_duplicates allows more",
        )
    share += not_all_compared(limited)
    job.events.note("near-twins", f"{share}; {most:.2%} are allowed{': ' if examples else ''}{examples}")
    return len(twins)
