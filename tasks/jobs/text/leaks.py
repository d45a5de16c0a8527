"""Weights must not be calibrated on what they are judged by: rows of train that are, or almost are, in dev or test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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

    split: str
    turns: list[Message]


def refuse_leaks(train: list[dict[str, Any]], held: list[dict[str, Any]], *, path: Path) -> None:
    """Raise StageError where a row of train, by hash, text or tokens, is in dev or test."""

    def keys(row: dict[str, Any]) -> set[object]:
        return {row["row"], normalised(json.loads(row["messages"])), tuple(row["input_ids"])}

    seen = set[object]().union(*map(keys, held))
    leaked = [row["row"] for row in train if keys(row) & seen]
    if leaked:
        raise StageError.of(
            what=f"{len(leaked)} row(s) of train are in dev or test, too",
            where=f"{path}, rows {', '.join(leaked[:SHOWN])}",
            why="weights would be calibrated on what they are judged by",
            next="make the dataset again with quench run; prepare removes duplicates",
        )


def without_near_duplicates(rows: Mapping[str, Sequence[Message]]) -> list[str]:
    """Names of the rows, in their order, without those that are almost equal to an earlier one that stays."""
    pairs = near_duplicate_turns(rows, dict.fromkeys(rows, "train"), jaccard=JACCARD).pairs
    repeated = {pair.row for pair in pairs}
    return [name for name in rows if name not in repeated]


def near_twins(drawn: Mapping[str, Sequence[Message]], held: Mapping[str, HeldOutRow], *, most: float, job: Job) -> int:
    """Count, list and note drawn rows that are almost equal to a row of dev or test.

    Args:
        drawn: Turns by name.
        held: Rows of dev and test, by name.
        most: Share of the drawn rows that may be.
        job: Gets near_twins.jsonl and notes.

    Raises:
        StageError: They are more than that.
    """
    turns: dict[str, Sequence[Message]] = {name: row.turns for name, row in held.items()}
    sides: dict[str, Side] = dict.fromkeys(held, "test")  # each of them is compared, whatever is near it
    for name in drawn:
        sides[name] = "train"
    pairs, limited = near_duplicate_turns(turns | dict(drawn), sides, jaccard=JACCARD)
    twins = sorted((pair.row, pair.like) for pair in pairs if pair.row in drawn and pair.like in held)
    lines = [json.dumps({"row": row, "like": like, "split": held[like].split}) + "\n" for row, like in twins]
    (job.out / TWINS).write_text("".join(lines), encoding="utf-8")
    examples = ", ".join(f"{row} like {like} of {held[like].split}" for row, like in twins[:SHOWN])
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
