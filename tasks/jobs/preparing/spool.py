"""Rows on disk between reading and rendering: 30 bytes of each are in memory, whatever it holds.

The file is read by place and length, not memory-mapped: pages of a map count as memory of the process.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.data.formats import TEXT
from recipes.data.rows import Side
from recipes.data.turns import Message

SIDES: tuple[Side, ...] = ("dev", "test", "train")  # by name: the order of rows.parquet
CHUNK_ROWS, CHUNK_BYTES = 500, 4 << 20


class SpooledRow(NamedTuple):
    """A row with its place in the data set.

    Attributes:
        name: 16 hex digits.
        where: File and line.
        group: What keeps it on one side with others.
        split: That side.
        domain: Its domain, empty where none is named.
        messages: Turns in normal form.
        tools: Of the row, or None.
        columns: All other columns.
        identity: JSON text of the columns that are part of what the row is; empty where there are none.
    """

    name: str
    where: str
    group: str
    split: Side
    domain: str
    messages: list[Message]
    tools: Any
    columns: dict[str, Any]
    identity: str

    @property
    def is_text(self) -> bool:
        """A plain text: no prompt, no template."""
        return self.messages[0]["role"] == TEXT


class Spool:
    """Rows in the order in which they were read; a place is a row's number in it, from 0."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb+")
        self._starts, self._names, self._sides = array("q", [0]), array("Q"), array("b")
        self._origins, self._drawn = array("h"), array("b")

    def add(self, row: SpooledRow, *, origin: int, drawn: bool) -> None:
        """Append a row.

        Args:
            row: The row.
            origin: Number of its source.
            drawn: The weight of its source keeps it.
        """
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
        self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))
        self._names.append(int(row.name, 16))
        self._sides.append(SIDES.index(row.split))
        self._origins.append(origin)
        self._drawn.append(drawn)

    def close(self) -> None:
        """No row is read any more."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, place: int) -> SpooledRow:
        """The row at a place, read from the disk."""
        self._file.flush()
        start, stop = self._starts[place], self._starts[place + 1]
        return SpooledRow(*json.loads(os.pread(self._file.fileno(), stop - start, start)))

    @property
    def names(self) -> NDArray[np.uint64]:
        """Of each row."""
        return np.frombuffer(self._names, dtype=np.uint64)

    @property
    def sides(self) -> NDArray[np.int8]:
        """Of each row: a place in SIDES."""
        return np.frombuffer(self._sides, dtype=np.int8)

    @property
    def origins(self) -> NDArray[np.int16]:
        """Of each row: the number of its source."""
        return np.frombuffer(self._origins, dtype=np.int16)

    @property
    def drawn(self) -> NDArray[np.bool_]:
        """Of each row: the weight of its source keeps it."""
        return np.frombuffer(self._drawn, dtype=np.bool_)

    def chunks(self, places: NDArray[np.int64]) -> Iterator[Sequence[int]]:
        """The places, in their order, in lists of at most 500 rows and some 4 MiB."""
        chunk: list[int] = []
        size = 0
        for place in map(int, places):
            chunk.append(place)
            size += self._starts[place + 1] - self._starts[place]
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk
