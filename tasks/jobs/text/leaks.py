"""Weights must not be calibrated on what they are judged by: rows of train that are, or almost are, in dev or test."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.data.rows import Side, normalised
from recipes.data.turns import Message
from recipes.doubles.near_duplicates import near_duplicate_turns, not_all_compared
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

JACCARD = 0.9  # of 5-grams of prompt and completion: from here on a row is a near-twin of another
SHOWN = 20
TWINS = "near_twins.jsonl"


class HeldOutRow(NamedTuple):
    """A row of dev or test."""

    row: str
    split: str
    turns: list[Message]


def refuse_leaks(train: Iterable[dict[str, Any]], held: Iterable[dict[str, Any]], *, path: Path) -> None:
    """Raise StageError where a row of train, by hash, text or tokens, is in dev or test."""
    seen = {key for row in held for key in _keys(row)}
    leaked = [row["row"] for row in train if not seen.isdisjoint(_keys(row))]
    if leaked:
        raise StageError.of(
            what=f"{len(leaked)} row(s) of train are in dev or test, too",
            where=f"{path}, rows {', '.join(leaked[:SHOWN])}",
            why="weights would be calibrated on what they are judged by",
            next="make the dataset again with quench run; prepare removes duplicates",
        )


def _keys(row: dict[str, Any]) -> set[bytes]:
    """16 bytes each of name, text and tokens."""
    parts = (row["row"].encode(), normalised(json.loads(row["messages"])).encode(), repr(row["input_ids"]).encode())
    return {hashlib.blake2b(part, digest_size=16).digest() for part in parts}


def without_near_duplicates(rows: Iterable[tuple[str, Sequence[Message]]]) -> list[str]:
    """Names of the rows, in their order, without those that are almost equal to an earlier one that stays.

    Args:
        rows: Name and turns of each; read once.
    """
    names: list[str] = []
    sides: dict[str, Side] = {}

    def named() -> Iterator[tuple[str, Sequence[Message]]]:
        for name, turns in rows:
            names.append(name)
            sides[name] = "train"
            yield name, turns

    repeated = {pair.row for pair in near_duplicate_turns(named(), sides, jaccard=JACCARD).pairs}
    return [name for name in names if name not in repeated]


def near_twins(drawn: Mapping[str, Sequence[Message]], held: Iterable[HeldOutRow], *, most: float, job: Job) -> int:
    """Count, list and note drawn rows that are almost equal to a row of dev or test.

    Args:
        drawn: Turns by name.
        held: Rows of dev and test; read once.
        most: Share of the drawn rows that may be.
        job: Gets near_twins.jsonl and notes.

    Raises:
        StageError: They are more than that.
    """
    splits: dict[str, str] = {}
    sides: dict[str, Side] = dict.fromkeys(drawn, "train")

    def every() -> Iterator[tuple[str, Sequence[Message]]]:
        for row, split, turns in held:
            splits[row] = split
            sides[row] = "test"  # each of them is compared, whatever is near it
            yield row, turns
        yield from drawn.items()

    pairs, limited = near_duplicate_turns(every(), sides, jaccard=JACCARD)
    twins = sorted((pair.row, pair.like) for pair in pairs if pair.row in drawn and pair.like in splits)
    lines = [json.dumps({"row": row, "like": like, "split": splits[like]}) + "\n" for row, like in twins]
    (job.out / TWINS).write_text("".join(lines), encoding="utf-8")
    examples = ", ".join(f"{row} like {like} of {splits[like]}" for row, like in twins[:SHOWN])
    share = f"{len(twins)} of {len(drawn)} rows are near-twins of a row of dev or test (Jaccard >= {JACCARD:g})"
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
