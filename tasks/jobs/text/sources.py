"""The sources of a recipe -> the rows that go on: read, drawn by weight, near-duplicates counted or removed."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from recipes.data.rows import Row, Rows, Side, drawn, malformed, origins, read_origin, side, source_name
from tasks.jobs.text.near_duplicates import COMPARED, near_duplicates
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def read_sources(job: Job) -> list[Rows]:
    """Every source's rows.

    Raises:
        StageError: Malformed rows of all sources, or a source without rows.
    """
    params = job.params
    paths = [job.inputs[source_name(number)].path for number in range(len(params["sources"]))]
    columns = [params.get("group"), *params.get("keep_columns", [])]
    sources = origins(paths, params["sources"], domain=params.get("domain"), columns=columns)
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
    return reads


class Selection(NamedTuple):
    """The rows that go on, by name, and counts for the summary."""

    rows: dict[str, Row]
    counts: dict[str, Any]


def select(job: Job, rows: dict[str, Row]) -> Selection:
    """The rows that the weights of their sources keep, without near-duplicates where these are to be removed."""
    params = job.params
    sides: dict[str, Side] = {name: _side(job, name, row) for name, row in rows.items()}
    kept = _drawn(job, rows, sides)
    counts: dict[str, Any] = {"not_drawn_rows": len(rows) - len(kept)}
    if params["near_duplicates"] == "ignore":
        return Selection(kept, counts)
    turns = {name: row.messages for name, row in kept.items()}
    found, limited = near_duplicates(turns, sides, jaccard=params["near_duplicate_jaccard"])
    remove = {one.row for one in found if sides[one.row] != "test"} if params["near_duplicates"] == "remove" else set()
    counts["near_duplicates"] = {
        "rows": len(found),
        "across_sides": sum(sides[one.row] != sides[one.like] for one in found),
        "removed": len(remove),
    } | {name: sum(sides[one.row] == name for one in found) for name in ("train", "dev", "test")}
    said = _said(counts["near_duplicates"], params)
    if limited:
        said += f"; {limited} rows were compared with {COMPARED} of the rows that MinHash proposed, not with all"
    job.events.note("near-duplicates", said)
    return Selection({name: row for name, row in kept.items() if name not in remove}, counts)


def _side(job: Job, name: str, row: Row) -> Side:
    params = job.params
    group = str(row.columns[params["group"]]) if params.get("group") else name
    return side(group, salt=params["salt"], dev=params["dev"], test=params["test"])


def _drawn(job: Job, rows: dict[str, Row], sides: dict[str, Side]) -> dict[str, Row]:
    """Dev, test, and the share of every source's train rows that its weight keeps."""
    salt, train = job.params["salt"], [name for name in rows if sides[name] == "train"]
    out = {name for name in train if not drawn(name, weight=rows[name].origin.weight, salt=salt)}
    if out:
        had, lost = Counter(rows[name].origin for name in train), Counter(rows[name].origin for name in out)
        said = [f"{had[one] - lost[one]} of {had[one]} from {one.path.name} ({one.weight:g})" for one in had]
        job.events.note("weights", f"train rows kept by hash: {', '.join(said)}; dev and test keep all")
    return {name: row for name, row in rows.items() if name not in out}


def _said(counts: dict[str, int], params: dict[str, Any]) -> str:
    text = (
        f"{counts['rows']} rows share {params['near_duplicate_jaccard']:g} or more of their word 5-grams with another: "
        f"{counts['train']} in train, {counts['dev']} in dev, {counts['test']} in test; "
        f"{counts['across_sides']} of them resemble a row of another side"
    )
    if params["near_duplicates"] == "remove":
        return f"{text}; {counts['removed']} removed from train and dev, none from test"
    return f"{text}; data.near_duplicates: remove leaves them out of train and dev" if counts["rows"] else text
