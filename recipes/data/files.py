"""Rows as they are in files: JSONL, a JSON array, CSV, parquet, or a folder of these. Only parquet imports pyarrow.

Every row has a place where a reader finds it: `rows.jsonl:17` is a line, `rows.parquet#17` is the 17th row.
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipes.plain import is_list, is_mapping

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what data set tools leave
PYARROW = "pyarrow.parquet"  # imported only for parquet files: it takes 0.3 s, and has no types
BROKEN = (ValueError, OSError, NotImplementedError)  # what pyarrow raises for a file that it cannot read
BATCH = 1000  # rows of a parquet file that are held as Python values at once


class RawRow(NamedTuple):
    """One row as it is in its file.

    Attributes:
        where: `file:LINE`, or `file#ROW` where rows have no lines.
        values: Its columns; None where it cannot be read.
        wrong: Why it cannot be read.
    """

    where: str
    values: dict[str, Any] | None
    wrong: str = ""


class Unread(ValueError):
    """A row cannot be read; the message says why."""


def data_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that hold rows, sorted; only its train files where it has any.

    A train file is one whose name, or a folder on the way to it, begins with `train`. Hidden files are left out.
    """
    if path.is_file():
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.name not in NOT_ROWS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    train = [file for file in files if any(part.startswith("train") for part in file.relative_to(path).parts)]
    return train or files


def raw_rows(path: Path, *, inside: str = "") -> Iterator[RawRow]:
    """The rows of a file or folder, in the order of `data_files`.

    Args:
        path: File or folder; a file of another ending is read as JSONL.
        inside: Prefix of every `where`, to tell sources apart.
    """
    for file in data_files(path):
        shown = inside + (file.name if file == path else str(file.relative_to(path)))
        suffix = file.suffix.lower()
        if suffix == ".csv":
            yield from _csv(file, shown)
        elif suffix == ".parquet":
            yield from _parquet(file, shown)
        elif suffix == ".json" and _is_array(file):
            yield from _array(file, shown)
        else:
            yield from _lines(file, shown)


def parquet_rows(path: Path) -> int | None:
    """Rows of a parquet file, from its footer; None for another file or one that is broken."""
    if path.suffix.lower() != ".parquet":
        return None
    parquet: Any = importlib.import_module(PYARROW)
    try:
        return int(parquet.read_metadata(path).num_rows)
    except BROKEN:
        return None


def _lines(file: Path, shown: str) -> Iterator[RawRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _read(f"{shown}:{number}", line)


def _read(where: str, line: bytes) -> RawRow:
    try:
        value: object = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return RawRow(where, None, f"is not JSON ({error})")
    return _object(where, value)


def _object(where: str, value: object) -> RawRow:
    if not is_mapping(value):
        return RawRow(where, None, f"is a JSON {type(value).__name__}, not an object")
    return RawRow(where, value)


def _is_array(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _array(file: Path, shown: str) -> Iterator[RawRow]:
    try:
        values: list[object] = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        yield RawRow(f"{shown}{line}", None, f"is not JSON ({error})")
        return
    for number, value in enumerate(values, start=1):
        yield _object(f"{shown}#{number}", value)


def _csv(file: Path, shown: str) -> Iterator[RawRow]:
    """Rows under a header line. An empty cell is a column that the row does not have."""
    csv.field_size_limit(sys.maxsize)  # 131,072 characters by default; a document can have more
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.reader(opened)
        try:
            header: list[str] = next(reader, list[str]())
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                yield RawRow(f"{shown}:1", None, f"names a column twice: {', '.join(twice)}")
                return
            start = reader.line_num + 1
            for cells in reader:  # a quoted cell may hold line ends: a row begins after the last line of the one before
                where, start = f"{shown}:{start}", reader.line_num + 1
                if cells:
                    yield _cells(where, header, cells)
        except csv.Error as error:
            yield RawRow(f"{shown}:{reader.line_num}", None, f"is not CSV ({error})")


def _cells(where: str, header: list[str], cells: list[str]) -> RawRow:
    if len(cells) != len(header):
        return RawRow(where, None, f"has {len(cells)} cells; the header has {len(header)}")
    if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell if not cell.isascii()):
        return RawRow(where, None, "is not UTF-8")
    return RawRow(where, {name: cell for name, cell in zip(header, cells, strict=True) if cell})


def _parquet(file: Path, shown: str) -> Iterator[RawRow]:
    parquet: Any = importlib.import_module(PYARROW)
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{shown}#{number}", _plain(values))
    except BROKEN as error:
        place = f"{shown}#{number + 1}" if number else shown
        yield RawRow(place, None, f"is not parquet ({str(error).splitlines()[0]})")


def _plain(value: Any) -> Any:
    """As JSON has it: no keys without a value (a parquet struct has all keys in all rows), dates as text."""
    if is_mapping(value):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    if is_list(value):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
