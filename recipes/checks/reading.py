"""All rows of a recipe, read once, one after the other: nothing of a row stays but what its checks keep."""

from __future__ import annotations

import re
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recipes.checks.scorers import RowChecks
from recipes.checks.split import Sides, Split
from recipes.data.origin import Origin
from recipes.data.rows import Row, RowReader, malformed, read_origin
from recipes.data.wrong import Wrong
from recipes.problem import Problem
from recipes.read.load import Loaded

if TYPE_CHECKING:
    from recipes.doubles.search import Doubles, DoubleSearch

PLACE = re.compile(r"(.*[:#])(\d+)", re.DOTALL)


@dataclass(kw_only=True)
class SourceRead:
    """What reading a source showed.

    Attributes:
        origin: The source.
        format: None where no row has the columns of one.
        detected_from: The place of the row that showed the format.
        rows: How many good ones there are.
        wrong: Malformed rows.
        problems: Why no row can be read.
        left_out: How many rows data.keep leaves out.
        unused: Columns that are no part of the turns and that the recipe does not name.
    """

    origin: Origin
    format: str | None = None
    detected_from: str = ""
    rows: int = 0
    wrong: Wrong = field(default_factory=Wrong)
    problems: list[Problem] = field(default_factory=list[Problem])
    left_out: int = 0
    unused: list[str] = field(default_factory=list[str])

    @property
    def is_good(self) -> bool:
        """It has rows, and none that cannot be read."""
        return bool(self.rows) and not self.wrong.count and not self.problems

    def later_problems(self) -> Iterator[Problem]:
        """What `check`, which reads the first row, has not said."""
        first = read_origin(self.origin, max_rows=1)
        if lines := [line for line in self.wrong.lines if line not in first.wrong]:
            yield malformed([self.origin.path], lines, count=self.wrong.count - len(first.wrong))
        yield from (problem for problem in self.problems if problem not in first.problems)


@dataclass(kw_only=True)
class RowsRead:
    """All sources, read.

    Attributes:
        sources: One after the other.
        sides: The split, without near-duplicates that are removed.
        checks: What scorers need of the rows.
        doubles: None where they were not looked for: the recipe says so, or a row cannot be read.
        places: Of the rows that `doubles` has the numbers of.
    """

    sources: list[SourceRead]
    sides: Sides
    checks: RowChecks
    doubles: Doubles | None
    places: Places


class Places:
    """Where rows are (`file.jsonl:17`), 12 bytes each."""

    def __init__(self) -> None:
        """No rows yet."""
        self._files: dict[str, int] = {}
        self._file, self._line = array("i"), array("q")

    def add(self, where: str) -> None:
        """The next row."""
        match = PLACE.fullmatch(where)
        file, line = (match[1], int(match[2])) if match else (where, -1)
        self._file.append(self._files.setdefault(file, len(self._files)))
        self._line.append(line)

    def __getitem__(self, number: int) -> str:
        """The place of a row, by its number."""
        file, line = list(self._files)[self._file[number]], self._line[number]
        return file if line < 0 else f"{file}{line}"


def read_rows(loaded: Loaded, origins: Sequence[Origin]) -> RowsRead:
    """Read every row of these sources.

    Args:
        loaded: The recipe.
        origins: Its sources, as far as they are local.
    """
    data = loaded.recipe.data
    split, checks, places = Split(data), RowChecks(loaded), Places()
    with tempfile.TemporaryDirectory(prefix="quench-rows-") as folder:
        search = None if data.near_duplicates == "ignore" else _search(Path(folder))
        sources = [_read(origin, split, checks, places, search) for origin in origins]
        doubles = None
        if search and data.near_duplicates != "ignore" and all(source.is_good for source in sources):
            mode: Literal["count", "remove"] = data.near_duplicates
            doubles = search.find(mode=mode, jaccard=data.near_duplicate_jaccard)
    removed = doubles.removed.tolist() if doubles else None
    return RowsRead(sources=sources, sides=split.sides(removed=removed), checks=checks, doubles=doubles, places=places)


def _search(folder: Path) -> DoubleSearch:
    from recipes.doubles.search import DoubleSearch  # numpy takes 0.1 s

    return DoubleSearch(folder)


def _read(origin: Origin, split: Split, checks: RowChecks, places: Places, search: DoubleSearch | None) -> SourceRead:
    source, reader = SourceRead(origin=origin), RowReader(origin)
    for row in reader:
        if not isinstance(row, Row):
            if row.problem:
                source.problems.append(row.problem)
            else:
                source.wrong.add(str(row))
            continue
        source.rows += 1
        on = split.add(row)
        checks.add(row, held_out=on in ("dev", "test"))
        if on and search:
            places.add(row.where)
            search.add(row.name, on, row.messages, row.tools)
    source.format, source.detected_from = reader.format, reader.detected_from
    source.left_out, source.unused = reader.left_out, reader.unused()
    return source
