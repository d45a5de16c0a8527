"""Which of the rows that were read go on: one of equal ones, what weights keep, near-duplicates counted or removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.doubles import NOT_LOOKED_FOR
from recipes.doubles.search import DoubleSearch
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
        job.events.note("leaks", NOT_LOOKED_FOR)
        return Selection(kept, duplicates, counts)
    doubles = _doubles(job, spool, kept, scratch)
    return Selection(kept[~doubles.removed], duplicates, counts | doubles.counts)


class _Doubles(NamedTuple):
    """Which of the rows go as near-duplicates, and what the summary says of these and of leaks."""

    removed: NDArray[np.bool_]
    counts: dict[str, Any]


def _doubles(job: Job, spool: Spool, places: Places, scratch: Path) -> _Doubles:
    """Near-duplicates and leaks among the rows at these places, noted and counted."""
    mode, jaccard = job.params["near_duplicates"], job.params["near_duplicate_jaccard"]
    search, progress = DoubleSearch(scratch), Progress(job.events, note="near-duplicates", total=len(places))
    for place in places.tolist():
        row = spool[place]
        search.add(row.name, row.split, row.messages, row.tools)
        progress.step()
    doubles = search.find(mode=mode, jaccard=jaccard)

    def where(number: int) -> str:
        return spool[int(places[number])].where

    job.events.note("near-duplicates", doubles.words(mode=mode, jaccard=jaccard))
    job.events.note("leaks", doubles.leaks.words(where))
    leaks = doubles.leaks.counts | {"examples": doubles.leaks.examples(where)}
    return _Doubles(doubles.removed, {"near_duplicates": doubles.near, "leaks": leaks})


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
