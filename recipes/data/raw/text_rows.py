"""Rows of plain text files: a text a line, or cells under a header line (CSV, TSV)."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.data.raw.opening import kind, text_of
from recipes.data.raw.row import RawRow, Unread
from recipes.data.raw.strict import NOT_UTF8, NUL, is_unicode, parse
from recipes.plain import is_list, is_mapping

# Columns whose cells hold turns or tools as JSON text. Any other cell is text, also one that is JSON.
OF_TURNS = ("messages", "conversations", "history", "tools", "tool_calls")
# Columns that hold a text or turns: a list of these keys is turns, any other JSON is an answer that is JSON.
TEXT_OR_TURNS = ("prompt", "completion", "chosen", "rejected")
TURN_KEYS = ("role", "from")


def text_rows(file: Path, shown: str) -> Iterator[RawRow]:
    """Lines as rows `{"text": ...}`; blank lines are left out."""
    with text_of(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                text = line.removesuffix("\n").removesuffix("\r")
                wrong = NUL if "\0" in text else "" if is_unicode(text) else NOT_UTF8
                yield RawRow(f"{shown}:{number}", None if wrong else {"text": text}, wrong)


def csv_rows(file: Path, shown: str) -> Iterator[RawRow]:
    """Rows under a header line. An empty cell is a column that the row does not have."""
    csv.field_size_limit(sys.maxsize)  # 131,072 characters by default; a document can have more
    with text_of(file, newline="") as opened:
        delimiter = _delimiter(file)
        reader = csv.reader(opened, delimiter=delimiter, strict=True)
        start = 1
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
            yield RawRow(f"{shown}:{start}", None, f"is not CSV ({error}); what is behind it was not read")


def _delimiter(file: Path) -> str:
    """What stands between the names in the header line: a spreadsheet of some countries writes semicolons."""
    if kind(file) == ".tsv":
        return "\t"
    with text_of(file) as opened:
        header = opened.readline()
    return next((char for char in ",;\t" if char in header), ",")


def _cells(where: str, header: list[str], cells: list[str]) -> RawRow:
    if len(cells) != len(header):
        return RawRow(where, None, f"has {len(cells)} cells; the header has {len(header)}")
    for cell in cells:
        if "\0" in cell:
            return RawRow(where, None, NUL)
        if not cell.isascii() and not is_unicode(cell):
            return RawRow(where, None, NOT_UTF8)
    try:
        return RawRow(where, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell})
    except Unread as error:
        return RawRow(where, None, str(error))


def _cell(name: str, cell: str) -> Any:
    """Turns and tools in a cell as the value that they are written for.

    Raises:
        Unread: It is JSON that no row may hold.
    """
    if (name not in OF_TURNS and name not in TEXT_OR_TURNS) or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        value = parse(cell)
    except Unread as error:
        if name in OF_TURNS:
            raise Unread(f"holds a `{name}` that {error}") from None
        return cell
    if name in OF_TURNS:
        return value
    is_turns = is_list(value) and all(is_mapping(item) and any(key in item for key in TURN_KEYS) for item in value)
    return value if is_turns and value else cell
