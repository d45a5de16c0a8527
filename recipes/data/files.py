"""Rows as they are in files of every kind, or in a folder of these; the one door to them.

Every row has a place where a reader finds it: `rows.jsonl:17` is a line, `rows.parquet#17` is the 17th row. Only Arrow
files and Zstandard import pyarrow, which takes 0.3 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recipes.data.folders import NO_FILES, FolderChoice, data_files
from recipes.data.raw.arrow_rows import arrow_rows, parquet_rows
from recipes.data.raw.json_rows import json_rows
from recipes.data.raw.opening import UNREADABLE, kind, text_bytes
from recipes.data.raw.row import RawRow, Unread
from recipes.data.raw.text_rows import csv_rows, text_rows

__all__ = [
    "NO_FILES",
    "FolderChoice",
    "RawRow",
    "Unread",
    "data_files",
    "parquet_rows",
    "raw_rows",
    "rows_of",
    "text_bytes",
]

Reader = Callable[[Path, str], Iterator[RawRow]]
READERS: dict[str, Reader] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".txt": text_rows,
    ".parquet": arrow_rows,
    ".arrow": arrow_rows,
}


def raw_rows(path: Path, *, inside: str = "", config: str | None = None, split: str | None = None) -> Iterator[RawRow]:
    """The rows of a file or folder, in the order of `data_files`, one at a time.

    A column without a value is one that the row does not have; a null deeper inside stays. What cannot be read is a row
    that says why, and no exception: the file's other rows follow where they can be found.

    Args:
        path: File or folder; a file of another ending is read as JSON.
        inside: Prefix of every `where`, to tell sources apart.
        config: Configuration of a folder, by name.
        split: Split of a folder, by name.

    Raises:
        FolderChoice: See `data_files`.
    """
    yield from rows_of(data_files(path, config=config, split=split), path, inside=inside)


def rows_of(files: Sequence[Path], path: Path, *, inside: str = "") -> Iterator[RawRow]:
    """The rows of these files, see `raw_rows`.

    Args:
        files: Of `path`, as `data_files` names them.
        path: The file, or the folder that they are in.
        inside: Prefix of every `where`, to tell sources apart.
    """
    for file in files:
        shown = inside + (file.name if file == path else str(file.relative_to(path)))
        try:
            yield from READERS.get(kind(file), json_rows)(file, shown)
        except UNREADABLE as error:
            yield RawRow(shown, None, f"cannot be read to its end ({str(error) or type(error).__name__})")
