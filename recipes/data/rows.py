"""Reads and judges training rows: which columns are turns, malformed rows, names, split, draw. Standard library only.

`quench check --data`, `quench init` and the prepare job share it, so what passes the check passes the job. A row comes
out of a file (recipes/data/files.py), under the names that the recipe gives its columns (formats.py), with its turns in
one form (turns.py, tools.py).
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from recipes.data.files import NO_FILES, FolderChoice, Unread, data_files, rows_of
from recipes.data.formats import (
    FIELDS,
    OPTIONAL,
    TEXT,
    Format,
    NoFormat,
    columns_of,
    detect,
    is_kept,
    named_columns,
    refuse_preferences,
    turns_in,
)
from recipes.data.origin import Origin
from recipes.data.tools import Tool
from recipes.data.turns import Message
from recipes.problem import Problem

Side = Literal["train", "dev", "test"]
SIDES: tuple[Side, ...] = ("train", "dev", "test")
STAYS: tuple[Side, ...] = ("test", "dev", "train")  # of equal rows on several sides the first one in this order
SHOWN = 20  # malformed rows that are listed; the rest is counted


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training row.

    Attributes:
        where: `file.jsonl:LINE`, or `file.parquet#ROW`.
        messages: Turns in the form of recipes/data/turns.py; of a plain text its one turn, of the role `text`.
        tools: JSON schemas in the form of recipes/data/tools.py; None where the row has none.
        columns: All other columns.
        origin: Where it was read from.
    """

    where: str
    messages: list[Message]
    tools: list[Tool] | None = None
    columns: dict[str, Any]
    origin: Origin

    @property
    def is_text(self) -> bool:
        """A plain text: no prompt, no template."""
        return self.messages[0]["role"] == TEXT

    @property
    def identity(self) -> dict[str, Any]:
        """Columns that tell it apart from rows with the same turns and tools."""
        return {name: self.columns[name] for name in self.origin.identity if name in self.columns}

    @cached_property
    def name(self) -> str:
        """16 hex digits. Rows with one name are equal: turns, tools, and the columns that a domain or scorer reads."""
        return content_hash(self.messages, self.tools, self.identity)[:16]

    @cached_property
    def question(self) -> str:
        """16 hex digits of the first question: leading system turns, first user turn, tools; of a text, all of it.

        White space and Unicode forms do not count, so that copies of a question stay together.
        """
        turns = self.messages
        system = [turn for turn in turns if turn["role"] in ("system", "developer")]
        asked = [turn for turn in turns if turn["role"] == "user"][:1]
        first = [*system, *asked] if asked else turns[:-1] or turns
        return hashlib.sha256((normalised(first) + _exact(self.tools)).encode()).hexdigest()[:16]

    def group(self, column: str | None) -> str:
        """What stays together on one side of the split: the value of a column, else the first question."""
        return str(self.columns[column]) if column else self.question

    def domain(self, column: str | None) -> str:
        """The source's domain, else the value of a column, else nothing."""
        if self.origin.domain is not None:
            return self.origin.domain
        return str(self.columns[column]) if column else ""


@dataclass(frozen=True, kw_only=True)
class MalformedRow:
    """A row that cannot be read, or, with a problem, a reason why no row of its source can be.

    Attributes:
        where: Its place.
        why: `has no list of turns`.
        problem: Set where it is the source that is refused.
    """

    where: str
    why: str
    problem: Problem | None = None

    def __str__(self) -> str:
        return f"{self.where} {self.why}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a source holds: the good rows, and what is wrong with the others.

    Attributes:
        format: None where no row has the columns of one.
        detected_from: The place of the row that showed the format.
        rows: The good rows.
        wrong: `file.jsonl:LINE what is wrong with it`, one per malformed row.
        problems: The same as one problem, or why no row can be read.
        left_out: How many rows data.keep leaves out.
        unused: Columns that are no part of the turns and that the recipe does not name.
    """

    format: Format | None = None
    detected_from: str = ""
    rows: list[Row] = field(default_factory=list[Row])
    wrong: list[str] = field(default_factory=list[str])
    problems: list[Problem] = field(default_factory=list[Problem])
    left_out: int = 0
    unused: list[str] = field(default_factory=list[str])


class RowReader:
    """Reads the rows of a source one after the other; counts what it leaves out.

    Attributes:
        format: Known from the first row on, None before.
        detected_from: The place of that row.
        left_out: Rows that data.keep left out so far.
        columns: Columns that rows had so far, under the names of the file.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.format: Format | None = next((name for name in FIELDS if name == origin.format), None)
        self.detected_from = "the recipe"
        self.left_out = 0
        self.columns: dict[str, None] = {}

    def __iter__(self) -> Iterator[Row | MalformedRow]:
        """The rows in the order of the files. Nothing is held but the row at hand."""
        origin, rows = self.origin, 0
        files = _files(origin)
        if isinstance(files, Problem):
            yield _as_malformed(files)
            return
        for where, raw, unread in rows_of(files, origin.path, inside=origin.inside):
            rows += 1
            try:
                if raw is None:
                    raise Unread(unread)
                self.columns.update(dict.fromkeys(raw))
                if not is_kept(raw, origin.keep):
                    self.left_out += 1
                    continue
                yield self._row(raw, where)
            except NoFormat as error:
                yield MalformedRow(where=where, why=error.problem.what, problem=error.problem)
                return
            except Unread as error:
                yield MalformedRow(where=where, why=str(error))
        if rows:
            yield from map(_as_malformed, self._missing_columns())

    def unused(self) -> list[str]:
        """Columns that are no part of the turns and that the recipe does not name."""
        read = {*self.origin.named, *FIELDS[self.format or "text"], *OPTIONAL[self.format or "text"]}
        return sorted(name for name in self.columns if name not in read)

    def empty(self) -> Problem:
        """What is said of a source that had no row."""
        why = f"data.keep leaves all {self.left_out} rows out" if self.left_out else "the file is empty"
        return no_rows(self.origin.path, why)

    def _row(self, raw: dict[str, Any], where: str) -> Row:
        origin = self.origin
        mapped = [name for name, _ in origin.columns]
        refuse_preferences(raw, mapped=mapped, named=origin.named, where=where)
        values = named_columns(raw, origin.columns)
        if self.format is None:
            absent = [name for name in columns_of(origin.columns) if name not in raw]
            self.format = detect(values, mapped=mapped, where=where, absent=absent)
            self.detected_from = where
        fields = FIELDS[self.format]
        for name in (*fields, *origin.required):
            if values.get(name) is None:
                raise Unread(f"has no `{name}`" + self._source_of(name))
        messages, tools = turns_in(values, self.format, drop_reasoning=origin.drop_reasoning)
        own = {*fields, *OPTIONAL[self.format], *(("functions",) if self.format != "text" else ())}
        others = {name: value for name, value in values.items() if name not in own or name in origin.required}
        return Row(where=where, messages=messages, tools=tools, columns=others, origin=origin)

    def _source_of(self, name: str) -> str:
        """` (data.columns takes it from question)`, for an error."""
        source = dict(self.origin.columns).get(name)
        return f" (data.columns takes it from {source})" if source else ""

    def _missing_columns(self) -> Iterator[Problem]:
        """Columns that the recipe names and no row has: a slip of the pen would change what is trained."""
        for key, names in (
            ("data.columns", columns_of(self.origin.columns)),
            ("data.keep", [column for column, values in self.origin.keep if None not in values]),
        ):
            missing = [name for name in names if name not in self.columns]
            if missing:
                yield Problem(
                    what=f"No row has the column {', '.join(missing)}.",
                    where=f"{key}, {self.origin.path.name}",
                    why="It would be empty in every row.",
                    next=f"Correct its name; there are {', '.join(self.columns)}.",
                )


def iter_rows(origin: Origin) -> Iterator[Row | MalformedRow]:
    """The rows of a source one after the other, see RowReader."""
    return iter(RowReader(origin))


def read_rows(
    path: Path, *, format: str = "auto", required: tuple[str, ...] = (), max_rows: int | None = None, **options: Any
) -> Rows:
    """`read_origin` of a path; `options` are further fields of Origin."""
    return read_origin(Origin(path=path, format=format, required=required, **options), max_rows=max_rows)


def read_origin(origin: Origin, *, max_rows: int | None = None) -> Rows:
    """Read the rows of a source into lists and collect all problems.

    Args:
        origin: The source; with the format `auto` its first readable row shows the format.
        max_rows: Stop after so many rows.
    """
    path = origin.path
    reader = RowReader(origin)
    rows: list[Row] = []
    wrong: list[str] = []
    problems: list[Problem] = []
    for row in islice(reader, max_rows):
        if isinstance(row, Row):
            rows.append(row)
        elif row.problem is not None:
            problems.append(row.problem)
        else:
            wrong.append(str(row))
    problems += [malformed([path], wrong)] if wrong else []
    if not rows and not problems:
        problems.append(reader.empty())
    return Rows(
        format=reader.format,
        detected_from=reader.detected_from,
        rows=rows,
        wrong=wrong,
        problems=problems,
        left_out=reader.left_out,
        unused=reader.unused(),
    )


def normalised(messages: Iterable[Message]) -> str:
    """Canonical JSON of the turns: NFC, runs of white space one space, ends stripped."""
    return _exact([{key: _plain(value) for key, value in turn.items()} for turn in messages])


def content_hash(
    messages: list[Message], tools: list[Tool] | None = None, columns: Mapping[str, Any] | None = None
) -> str:
    """sha256 (hex) of turns, tools and columns as they are, white space included; its first 16 digits name a row."""
    content = {"messages": messages, "tools": tools, "columns": columns} if tools or columns else messages
    return hashlib.sha256(_exact(content).encode()).hexdigest()


def _exact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


def side(group: str, *, salt: str, dev: float, test: float) -> Side:
    """The side of the split that a group is on: a pure function of group and salt, whatever other rows exist."""
    share = int.from_bytes(hashlib.sha256(f"{salt}:{group}".encode()).digest()[:8], "big") / 2**64
    if share < test:
        return "test"
    return "dev" if share < test + dev else "train"


def drawn(row: str, *, weight: float, salt: str) -> bool:
    """Whether a train row of a source with this weight is kept: a pure function of its name, whatever other rows exist.

    A row that is kept stays kept when the weight or the source grows.
    """
    share = int.from_bytes(hashlib.sha256(f"{salt}:weight:{row}".encode()).digest()[:8], "big") / 2**64
    return share < weight


def _plain(value: object) -> object:
    return " ".join(unicodedata.normalize("NFC", value).split()) if isinstance(value, str) else value


def _files(origin: Origin) -> list[Path] | Problem:
    """The files of a source; or that it has no file of rows, or several sets of them."""
    try:
        files = data_files(origin.path, config=origin.config, split=origin.split)
    except FolderChoice as choice:
        return choice.problem(str(origin.path), written="source" if origin.inside else "data")
    return files or no_rows(origin.path, NO_FILES)


def _as_malformed(problem: Problem) -> MalformedRow:
    return MalformedRow(where=problem.where, why=problem.what, problem=problem)


def malformed(paths: Sequence[Path], wrong: list[str], *, count: int | None = None) -> Problem:
    """Malformed rows as one problem; of so many, where only the first ones are given."""
    return Problem(
        what=f"{count or len(wrong)} malformed row(s)",
        where=wrong[0].split(" ", 1)[0],
        why=f"these rows cannot be read:{first_lines(wrong, count=count)}",
        next=f"correct or remove them in {', '.join(map(str, paths))}",
    )


def first_lines(rows: Sequence[str], *, count: int | None = None) -> str:
    """The first 20 rows by name, one per line, and how many more there are; of `count`, where not all are given."""
    count = count or len(rows)
    more = [f"and {count - SHOWN} more"] if count > SHOWN else []
    return "".join(f"\n    {line}" for line in (*rows[:SHOWN], *more))


def no_rows(path: Path, why: str) -> Problem:
    """A source without a row."""
    return Problem(
        what="no training rows",
        where=str(path),
        why=why,
        next='give data.path a file with rows {"messages": [...]} or {"prompt": ..., "completion": ...}; '
        "docs/recipe.md names the other formats",
    )
