"""`quench show`: rows as prepare renders them, and what is trained of each. No weights are read and nothing is stored.

Rows are read in the order of the files, and reading stops at the last one that is shown: three rows of a million take
as long as three of ten.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from recipes.data.origin import Origin
from recipes.data.rows import MalformedRow, Row, drawn, iter_rows, malformed
from tasks.jobs.preparing.reading import origins_of, placed_row, read_sources
from tasks.jobs.preparing.records import Record, render
from tasks.jobs.preparing.renderer import open_renderer, unsound
from tasks.jobs.preparing.selection import select
from tasks.jobs.text.rendering import Renderer
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

FILE = "shown.json"
DIGITS = frozenset("0123456789abcdef")


class FoundRow(NamedTuple):
    """A row, and why prepare leaves it out; empty where it stays."""

    row: Row
    left_out: str


def run(job: Job) -> dict[str, Any]:
    """Show one row, or the first rows of a side of the split.

    Reads:
        data, data-1 ...: one file or folder per source. tokenizer: the base's tokenizer files. template: Jinja file
        (may be absent).
    Writes:
        shown.json: a list with one entry per sample; `_entry` names its keys.

    Raises:
        StageError: No such row; malformed rows before the last one that is shown; rows that the template cannot mask.
    """
    renderer = open_renderer(job)
    row, count = job.params["show"]["row"], job.params["show"]["count"]
    rows = list(islice(_by_name(job, row), count)) if row else _of_split(job, count)
    shown = [entry for found in rows for entry in _entries(job, found, renderer)]
    (job.out / FILE).write_text(json.dumps(shown, ensure_ascii=False), encoding="utf-8")
    return {"rows": len(rows), "samples": len(shown)}


# ---- finding


def _of_split(job: Job, count: int) -> list[FoundRow]:
    """The first rows of a side that go on, in the order of the files.

    Raises:
        StageError: A row before the last of them is malformed, or the side has none.
    """
    split, found, wrong = job.params["show"]["split"], list[FoundRow](), list[MalformedRow]()
    for row in _rows(job):
        if isinstance(row, MalformedRow):
            wrong.append(row)
        elif not row.left_out and placed_row(row.row, job.params).split == split:
            found.append(row)
        if len(found) == count:
            break
    if wrong:
        paths = [origin.path for origin in origins_of(job)]
        refused = next((row.problem for row in wrong if row.problem), None)
        raise StageError(refused or malformed(paths, [str(row) for row in wrong]))
    if not found:
        raise StageError.of(
            what=f"{split} has no rows",
            where=f"data.{split}" if split != "train" else "data",
            why=f"groups fall on a side by hash; dev has a share of {job.params['dev']}, test {job.params['test']}",
            next="give more rows, another side (--split), or --row FILE:LINE for a row wherever it is",
        )
    return found


def _by_name(job: Job, name: str) -> Iterator[FoundRow]:
    """Rows with this name, or a name that begins so; or the row at this place. Those that are left out, too.

    Raises:
        StageError: There is none, or the row at this place is malformed.
    """
    count = 0
    for kept in (True, False):
        for row in _rows(job, kept=kept):
            if isinstance(row, MalformedRow):
                _refuse(row, name)
            elif _is_called(row.row, name) and not (count and row.left_out.startswith("equals")):
                count += 1
                yield row
                if _is_place(name) or name == row.row.name:
                    return
        if count:
            return
    raise StageError.of(
        what=f"there is no row {name}",
        where="--row",
        why=f"no row of {', '.join(str(origin.path) for origin in origins_of(job))} has this name or place",
        next="give a place as errors write it (rows.jsonl:17, rows.parquet#17), or a row's name or its beginning",
    )


def _refuse(row: MalformedRow, name: str) -> None:
    """Raise StageError where the malformed row is the one that is wanted, or none of its source can be read."""
    if row.problem:
        raise StageError(row.problem)
    if _is_place(name) and _at(row.where, name):
        raise StageError(malformed([], [str(row)]))


def _is_place(name: str) -> bool:
    return ":" in name or "#" in name


def _at(where: str, place: str) -> bool:
    """Whether two places are one; either may have more folders before the file's name."""
    return where == place or where.endswith(f"/{place}") or place.endswith(f"/{where}")


def _is_called(row: Row, name: str) -> bool:
    if _is_place(name):
        return _at(row.where, name)
    return row.name.startswith(name.split(".")[0])  # abcd.3: the sample of turn 3


def _rows(job: Job, *, kept: bool = True) -> Iterator[FoundRow | MalformedRow]:
    """All rows in the order of the files, with the reason why one is left out.

    Args:
        job: The job.
        kept: False: read also the rows that data.keep leaves out, as if it were not there.
    """
    params, selected, first = job.params, _selected(job), dict[str, str]()
    for origin in origins_of(job):
        for row in iter_rows(origin if kept else _without_keep(origin)):
            if isinstance(row, MalformedRow):
                yield row
                continue
            row = replace(row, origin=origin)
            left_out = "" if kept else _kept_out(row)
            if row.name in first:
                left_out = left_out or f"equals {first[row.name]}, which stays"
            elif placed_row(row, params).split == "train" and not drawn(
                row.name, weight=origin.weight, salt=params["salt"]
            ):
                left_out = left_out or f"the weight of its source, {origin.weight:g}, leaves it out"
            elif selected is not None and row.name not in selected:
                left_out = left_out or "data.near_duplicates removes it: it is almost equal to another row"
            first.setdefault(row.name, row.where)
            yield FoundRow(row, left_out)


def _without_keep(origin: Origin) -> Origin:
    """The same source with all its rows; the columns of data.keep are still named by the recipe."""
    return replace(origin, keep=(), identity=(*origin.identity, *(column for column, _ in origin.keep)))


def _kept_out(row: Row) -> str:
    values = {column: row.columns.get(column) for column, _ in row.origin.keep}
    said = ", ".join(f"`{column}` is {json.dumps(value, ensure_ascii=False)}" for column, value in values.items())
    return f"data.keep leaves it out: {said}"


def _selected(job: Job) -> set[str] | None:
    """Names of the rows that go on where near-duplicates are removed, which takes a look at all rows; else None."""
    if job.params["near_duplicates"] != "remove":
        return None
    with tempfile.TemporaryDirectory(dir=job.out) as scratch:
        reads = read_sources(job, Path(scratch))
        return {reads.spool[place].name for place in select(job, reads, Path(scratch)).places}


# ---- showing


def _entries(job: Job, found: FoundRow, renderer: Renderer) -> list[dict[str, Any]]:
    """What is shown of a row: its samples, as prepare makes them; of a row that is too long, why it is left out.

    Raises:
        StageError: The template cannot render it, or its completions are not among its tokens.
    """
    row = placed_row(found.row, job.params)
    rendered = render([row], renderer, max_length=job.params["max_length"])
    if rendered.wrong:
        raise unsound(rendered.wrong, renderer, count=1, seam=rendered.seam)
    if rendered.records:
        return [_entry(found, record, rendered.tally.lost, renderer) for record in rendered.records]
    long = f"its last exchange alone is over data.max_length: {max(rendered.tally.too_long)} tokens"
    record = {"row": row.name, "split": row.split, "group": row.group, "domain": row.domain, "answer": ""}
    record |= {"input_ids": [], "completion_mask": [], "prompt_ids": [], "dropped_turns": 0, "turn": 0}
    return [_entry(found._replace(left_out=found.left_out or long), record, [], renderer)]


def _entry(found: FoundRow, record: Record, lost: Sequence[int], renderer: Renderer) -> dict[str, Any]:
    """One sample.

    Returns:
        row: Its name. source: file and line. split, group, domain. left_out: why it is not in the data set, or null.
        text: All of it, as text. input_ids: int, [tokens]. trained: 0 or 1, [tokens]. trained_text: the trained parts,
        in their order. parts: [text, trained], in their order; together they are the text. prompt: what the answer is
        decoded from. answer: what it is compared with. turn: number of the one turn that is trained, 0 for all.
        cut_turns, cut_tokens: what data.max_length took away. tools: JSON schemas, or null. not_used: columns.
    """
    decode, row = renderer.tokenizer.decode, found.row
    ids, mask = record["input_ids"], record["completion_mask"]
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    parts = [(decode([token for token, _ in run]), bool(trained)) for trained, run in runs]
    return {
        **{name: record[name] for name in ("row", "split", "group", "domain")},
        "source": row.where,
        "left_out": found.left_out or None,
        "text": decode(ids),
        "input_ids": ids,
        "trained": [int(inside) for inside in mask],
        "trained_text": [text for text, trained in parts if trained],
        "parts": parts,
        "prompt": decode(record["prompt_ids"]),
        "answer": record["answer"],
        "turn": record["turn"],
        "cut_turns": record["dropped_turns"],
        "cut_tokens": sum(lost),
        "tools": row.tools,
        "not_used": [name for name in row.columns if name not in row.origin.named],
    }
