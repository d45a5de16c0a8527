"""Which of the rows that were read go on: one of equal ones, what weights keep, near-duplicates counted or removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.data.turns import Message
from tasks.jobs.preparing.reading import ReadSources
from tasks.jobs.preparing.spool import SIDES, Spool
from tasks.jobs.text.near_duplicates import near_duplicates, not_all_compared
from tasks.runtime.process.job import Job

Places = NDArray[np.int64]


class Selection(NamedTuple):
    """The rows that go on.

    Attributes:
        places: In the spool, in the order of rows.parquet: by side, by name.
        duplicates: Rows that equal an earlier one.
        counts: For the summary.
    """

    places: Places
    duplicates: int
    counts: dict[str, Any]


def select(job: Job, reads: ReadSources) -> Selection:
    """The rows that the weights of their sources keep, without near-duplicates where these are to be removed."""
    spool = reads.spool
    places = distinct(spool)
    kept = places[spool.drawn[places]]
    if len(kept) < len(places):
        job.events.note("weights", _weights(reads, places))
    counts: dict[str, Any] = {"not_drawn_rows": len(places) - len(kept)}
    duplicates = len(spool) - len(places)
    if job.params["near_duplicates"] == "ignore":
        return Selection(kept, duplicates, counts)
    remove, counts["near_duplicates"] = _near_duplicates(job, spool, kept)
    return Selection(kept[~np.isin(kept, remove)], duplicates, counts)


def distinct(spool: Spool) -> Places:
    """The first of the rows of each name, by side and name."""
    first = np.unique(spool.names, return_index=True)[1]  # sorted by name
    return first[np.argsort(spool.sides[first], kind="stable")]


def _weights(reads: ReadSources, places: Places) -> str:
    """`190 of 400 from first.jsonl (0.5)`, of each source with rows in train."""
    spool = reads.spool
    train = places[spool.sides[places] == SIDES.index("train")]
    had = np.bincount(spool.origins[train], minlength=len(reads.origins))
    kept = np.bincount(spool.origins[train[spool.drawn[train]]], minlength=len(reads.origins))
    shares = [
        f"{kept[number]} of {had[number]} from {origin.path.name} ({origin.weight:g})"
        for number, origin in enumerate(reads.origins)
        if had[number]
    ]
    return f"train rows kept by hash: {', '.join(shares)}; dev and test keep all"


class _Turns(Mapping[str, Sequence[Message]]):
    """Turns by name, read from the spool when they are asked for."""

    def __init__(self, spool: Spool, places: Places) -> None:
        self._spool = spool
        self._places = {f"{name:016x}": int(place) for name, place in zip(spool.names[places], places, strict=True)}

    def __getitem__(self, name: str) -> Sequence[Message]:
        return self._spool[self._places[name]].messages

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _near_duplicates(job: Job, spool: Spool, places: Places) -> tuple[Places, dict[str, int]]:
    """Places of the rows to remove, and counts."""
    params, turns = job.params, _Turns(spool, places)
    sides = {name: SIDES[side] for name, side in zip(turns, spool.sides[places], strict=True)}
    by_name = dict(zip(turns, places, strict=True))
    pairs, limited = near_duplicates(turns, sides, jaccard=params["near_duplicate_jaccard"])
    remove = [
        by_name[pair.row] for pair in pairs if params["near_duplicates"] == "remove" and sides[pair.row] != "test"
    ]
    counts = {
        "rows": len(pairs),
        "across_sides": sum(sides[pair.row] != sides[pair.like] for pair in pairs),
        "removed": len(remove),
    } | {name: sum(sides[pair.row] == name for pair in pairs) for name in ("train", "dev", "test")}
    job.events.note("near-duplicates", _in_words(counts, params) + not_all_compared(limited))
    return np.array(remove, dtype=np.int64), counts


def _in_words(counts: dict[str, int], params: dict[str, Any]) -> str:
    text = (
        f"{counts['rows']} rows share {params['near_duplicate_jaccard']:g} or more of their word 5-grams with another: "
        f"{counts['train']} in train, {counts['dev']} in dev, {counts['test']} in test; "
        f"{counts['across_sides']} of them resemble a row of another side"
    )
    if params["near_duplicates"] == "remove":
        return f"{text}; {counts['removed']} removed from train and dev, none from test"
    return f"{text}; data.near_duplicates: remove leaves them out of train and dev" if counts["rows"] else text
