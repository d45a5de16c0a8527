"""The sources of a recipe -> the rows that go on: read, drawn by weight, near-duplicates counted or removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from recipes.data.origin import origins, source_name
from recipes.data.rows import Row, Rows, Side, drawn, malformed, read_origin, side
from tasks.jobs.text.near_duplicates import near_duplicates, not_all_compared
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def read_sources(job: Job) -> list[Rows]:
    """Every source's rows.

    Raises:
        StageError: Malformed rows of all sources, or a source without rows.
    """
    params = job.params
    paths = [job.inputs[source_name(number)].path for number in range(len(params["sources"]))]
    sources = origins(
        paths, params["sources"], domain=params["domain"], group=params["group"], scored=params["scored_columns"]
    )
    reads = [read_origin(source) for source in sources]
    wrong = [line for read in reads for line in read.wrong]
    if wrong:
        raise StageError(malformed(paths, wrong))
    for read in reads:
        if read.problems:
            raise StageError(read.problems[0])
    job.events.note(
        "format",
        "; ".join(f"{read.format}, detected from {read.detected_from}; {len(read.rows)} rows" for read in reads),
    )
    if left_out := sum(read.left_out for read in reads):
        job.events.note("kept", f"data.keep leaves {left_out} rows out")
    return reads


class RowPlace(NamedTuple):
    """Where a row belongs."""

    group: str
    split: Side
    domain: str


def place_of(row: Row, params: Mapping[str, Any]) -> RowPlace:
    """The row's group (its first question where the recipe names no column), side and domain."""
    group = row.group(params["group"])
    split = side(group, salt=params["salt"], dev=params["dev"], test=params["test"])
    return RowPlace(group, split, row.domain(params["domain"]))


class Selection(NamedTuple):
    """The rows that go on, by name, and counts for the summary."""

    rows: dict[str, Row]
    counts: dict[str, Any]


def select(job: Job, rows: dict[str, Row]) -> Selection:
    """The rows that the weights of their sources keep, without near-duplicates where these are to be removed."""
    params = job.params
    sides: dict[str, Side] = {name: place_of(row, params).split for name, row in rows.items()}
    kept = _drawn(job, rows, sides)
    counts: dict[str, Any] = {"not_drawn_rows": len(rows) - len(kept)}
    if params["near_duplicates"] == "ignore":
        return Selection(kept, counts)
    turns = {name: row.messages for name, row in kept.items()}
    pairs, limited = near_duplicates(turns, sides, jaccard=params["near_duplicate_jaccard"])
    remove = {pair.row for pair in pairs if params["near_duplicates"] == "remove" and sides[pair.row] != "test"}
    counts["near_duplicates"] = {
        "rows": len(pairs),
        "across_sides": sum(sides[pair.row] != sides[pair.like] for pair in pairs),
        "removed": len(remove),
    } | {name: sum(sides[pair.row] == name for pair in pairs) for name in ("train", "dev", "test")}
    job.events.note("near-duplicates", _in_words(counts["near_duplicates"], params) + not_all_compared(limited))
    return Selection({name: row for name, row in kept.items() if name not in remove}, counts)


def _drawn(job: Job, rows: dict[str, Row], sides: dict[str, Side]) -> dict[str, Row]:
    """Dev, test, and the share of every source's train rows that its weight keeps."""
    salt, train = job.params["salt"], [name for name in rows if sides[name] == "train"]
    out = {name for name in train if not drawn(name, weight=rows[name].origin.weight, salt=salt)}
    if out:
        had, lost = Counter(rows[name].origin for name in train), Counter(rows[name].origin for name in out)
        kept = [
            f"{count - lost[origin]} of {count} from {origin.path.name} ({origin.weight:g})"
            for origin, count in had.items()
        ]
        job.events.note("weights", f"train rows kept by hash: {', '.join(kept)}; dev and test keep all")
    return {name: row for name, row in rows.items() if name not in out}


def _in_words(counts: dict[str, int], params: dict[str, Any]) -> str:
    text = (
        f"{counts['rows']} rows share {params['near_duplicate_jaccard']:g} or more of their word 5-grams with another: "
        f"{counts['train']} in train, {counts['dev']} in dev, {counts['test']} in test; "
        f"{counts['across_sides']} of them resemble a row of another side"
    )
    if params["near_duplicates"] == "remove":
        return f"{text}; {counts['removed']} removed from train and dev, none from test"
    return f"{text}; data.near_duplicates: remove leaves them out of train and dev" if counts["rows"] else text
