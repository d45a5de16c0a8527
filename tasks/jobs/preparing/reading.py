"""The sources of a recipe -> rows on disk, each with its group, side and domain. One pass, no row stays in memory."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recipes.data.origin import Origin, origins, source_name
from recipes.data.rows import Row, RowReader, drawn, side
from recipes.data.wrong import Wrong
from recipes.problem import Problem
from tasks.jobs.preparing.spool import Spool, SpooledRow
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.events import Events
from tasks.runtime.process.job import Job

EVERY_S = 2.0


class Progress:
    """Says every two seconds how many rows are done."""

    def __init__(self, events: Events, *, note: str, total: int = 0) -> None:
        self._events, self._note, self._total = events, note, total
        self._done, self._said = 0, time.monotonic()

    def step(self, rows: int = 1) -> None:
        """So many rows more are done."""
        self._done += rows
        if time.monotonic() - self._said >= EVERY_S:
            self._events.progress(self._done, max(self._total, self._done), unit="row", note=self._note)
            self._said = time.monotonic()


class ReadSources(NamedTuple):
    """What the first pass leaves.

    Attributes:
        spool: Every row.
        origins: The sources, in the recipe's order.
        format: Format of the first source.
        detected_from: The place of the row that showed it.
    """

    spool: Spool
    origins: list[Origin]
    format: str | None
    detected_from: str


def origins_of(job: Job) -> list[Origin]:
    """The sources of a job, in the recipe's order."""
    params = job.params
    paths = [job.inputs[source_name(number)].path for number in range(len(params["sources"]))]
    return origins(
        paths, params["sources"], domain=params["domain"], group=params["group"], scored=params["scored_columns"]
    )


def read_sources(job: Job, scratch: Path) -> ReadSources:
    """Every source's rows, spooled to a file in `scratch`.

    Raises:
        StageError: Malformed rows of all sources, or a source without rows.
    """
    params, sources = job.params, origins_of(job)
    spool, wrong, progress = Spool(scratch / "rows.jsonl"), Wrong(), Progress(job.events, note="reading")
    readers = [RowReader(source) for source in sources]
    words, problems = list[str](), list[Problem]()
    for number, reader in enumerate(readers):
        before = len(spool)
        for row in reader:
            progress.step()
            if isinstance(row, Row):
                placed = placed_row(row, params)
                keep = placed.split != "train" or drawn(row.name, weight=row.origin.weight, salt=params["salt"])
                spool.add(placed, origin=number, drawn=keep)
            elif row.problem is not None:
                problems.append(row.problem)
            else:
                wrong.add(str(row))
        words.append(f"{reader.format}, detected from {reader.detected_from}; {len(spool) - before} rows")
        if len(spool) == before and not wrong.count and not problems:
            problems.append(reader.empty())
    if wrong.count:
        raise StageError(wrong.malformed([source.path for source in sources]))
    if problems:
        raise StageError(problems[0])
    job.events.note("format", "; ".join(words))
    if left_out := sum(reader.left_out for reader in readers):
        job.events.note("kept", f"data.keep leaves {left_out} rows out")
    return ReadSources(spool, sources, readers[0].format, readers[0].detected_from)


def placed_row(row: Row, params: Mapping[str, Any]) -> SpooledRow:
    """The row with its group, side and domain.

    Args:
        row: The row.
        params: Of prepare: group, domain, salt, dev, test.
    """
    group = row.group(params["group"])
    identity = row.identity
    return SpooledRow(
        name=row.name,
        where=row.where,
        group=group,
        split=side(group, salt=params["salt"], dev=params["dev"], test=params["test"]),
        domain=row.domain(params["domain"]),
        messages=row.messages,
        tools=row.tools,
        columns=row.columns,
        identity=json.dumps(identity, sort_keys=True, default=str) if identity else "",
    )
