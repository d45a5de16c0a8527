"""Which of the rows that were read go on: one of equal ones, what weights keep, near-duplicates counted or removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.doubles.grams import GramWriter, compared_text
from recipes.doubles.near_duplicates import near_duplicates, not_all_compared
from tasks.jobs.preparing.reading import Progress, ReadSources
from tasks.jobs.preparing.spool import SIDES, Spool
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


def select(job: Job, reads: ReadSources, scratch: Path) -> Selection:
    """The rows that the weights of their sources keep, without near-duplicates where these are to be removed.

    Args:
        job: Params of prepare.
        reads: What was read.
        scratch: For a file of about the size of the rows.
    """
    spool = reads.spool
    places = distinct(spool)
    kept = places[spool.drawn[places]]
    if len(kept) < len(places):
        job.events.note("weights", _weights(reads, places))
    counts: dict[str, Any] = {"not_drawn_rows": len(places) - len(kept)}
    duplicates = len(spool) - len(places)
    if job.params["near_duplicates"] == "ignore":
        return Selection(kept, duplicates, counts)
    remove, counts["near_duplicates"] = _near_duplicates(job, spool, kept, scratch)
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


def _near_duplicates(job: Job, spool: Spool, places: Places, scratch: Path) -> tuple[Places, dict[str, int]]:
    """Places of the rows to remove, and counts."""
    params, writer = job.params, GramWriter(scratch / "grams")
    progress = Progress(job.events, note="near-duplicates", total=len(places))
    for place in places.tolist():
        writer.add(compared_text(spool[place].messages))
        progress.step()
    names = [f"{name:016x}" for name in spool.names[places].tolist()]
    own = [SIDES[side] for side in spool.sides[places].tolist()]
    grams = writer.finish()
    try:
        pairs, limited = near_duplicates(names, own, grams, jaccard=params["near_duplicate_jaccard"])
    finally:
        grams.close()
    numbers = {name: number for number, name in enumerate(names)}
    of = [(numbers[pair.row], numbers[pair.like]) for pair in pairs]
    remove = [row for row, _ in of if params["near_duplicates"] == "remove" and own[row] != "test"]
    counts = {
        "rows": len(pairs),
        "across_sides": sum(own[row] != own[like] for row, like in of),
        "removed": len(remove),
    } | {side: sum(own[row] == side for row, _ in of) for side in ("train", "dev", "test")}
    job.events.note("near-duplicates", _in_words(counts, params) + not_all_compared(limited))
    return places[remove], counts


def _in_words(counts: dict[str, int], params: dict[str, Any]) -> str:
    text = (
        f"{counts['rows']} rows share {params['near_duplicate_jaccard']:g} or more of their 5-grams with another: "
        f"{counts['train']} in train, {counts['dev']} in dev, {counts['test']} in test; "
        f"{counts['across_sides']} of them resemble a row of another side"
    )
    if params["near_duplicates"] == "remove":
        return f"{text}; {counts['removed']} removed from train and dev, none from test"
    return f"{text}; data.near_duplicates: remove leaves them out of train and dev" if counts["rows"] else text
