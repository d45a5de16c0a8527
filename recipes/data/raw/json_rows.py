"""Rows in JSON: one object a line, a list of objects, objects printed over many lines, or an object around a list."""

from __future__ import annotations

from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from recipes.data.raw.opening import text_of
from recipes.data.raw.row import RawRow, Unread, columns
from recipes.data.raw.strict import DECODER, parse
from recipes.data.raw.window import TooLong, Window
from recipes.plain import is_list, is_mapping

HEAD = 1 << 16  # characters that tell whether a row is a line
LONGEST = 1 << 22  # characters of a row; a longer object is one around a list of rows
# Columns of turns or texts: an object that has one is a row, not an object around a list of rows.
OF_TEXTS = ("messages", "conversations", "prompt", "completion", "instruction", "text", "chosen", "rejected")
OF_ROWS = frozenset((*OF_TEXTS, "question", "answer", "query", "response"))
SPEAKER = ("role", "from")  # what an object in a list of turns has, and none in a list of rows


def json_rows(file: Path, shown: str) -> Iterator[RawRow]:
    """The rows of a JSON file of any shape; they are never held together.

    Args:
        file: Compressed or not.
        shown: Its name in the place of a row.
    """
    return (_lines if _is_row_a_line(file) else _stream)(file, shown)


def _is_row_a_line(file: Path) -> bool:
    """Whether the first line that is not blank is a value, or is wrong in its middle, and there are lines behind it."""
    with text_of(file) as text:
        head = text.read(HEAD)
    line, end, rest = head.lstrip().partition("\n")
    if not end or (not rest.strip() and len(head) < HEAD):
        return False
    try:
        DECODER.decode(line)
    except JSONDecodeError as error:  # a value that is printed over many lines goes on behind the end of the first one
        return error.pos < len(line.rstrip()) and not line.startswith("[")
    except (RecursionError, ValueError):
        return True
    return True


def _lines(file: Path, shown: str) -> Iterator[RawRow]:
    with text_of(file) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{shown}:{number}"
            try:
                yield _row(where, parse(line))
            except Unread as error:
                if not line.isspace():
                    yield RawRow(where, None, str(error))


def _row(where: str, value: Any, *, within: str = "") -> RawRow:
    if not is_mapping(value):
        return RawRow(where, None, f"is a JSON {type(value).__name__}{within}, not an object")
    return RawRow(where, columns(value))


def _stream(file: Path, shown: str) -> Iterator[RawRow]:
    """Rows of a file in which a row can begin and end anywhere."""
    with text_of(file) as text:
        window = Window(text)
        try:
            if window.peek() == "[":
                yield from _listed(window, shown)
            elif window.peek() == "{" and (name := _around(window)) is not None:
                yield from _inside(window, shown, name)
            else:
                yield from _following(window, shown)
            if window.peek():
                raise Unread("goes on behind the end of its list of rows")
        except Unread as error:
            yield RawRow(f"{shown}:{window.line}", None, str(error))


def _following(window: Window, shown: str) -> Iterator[RawRow]:
    """Objects that follow each other."""
    number, before = 1, 0
    while window.peek():
        where, before = _place(shown, number, window.line, before), window.line
        yield _next(window, where, listed=False)
        number += 1


def _listed(window: Window, shown: str) -> Iterator[RawRow]:
    """Objects of a list.

    Raises:
        Unread: The list breaks off, behind the rows that could be read.
    """
    number, before = 1, window.line
    window.take("[")
    if window.take("]"):
        return
    while True:
        window.peek()
        where, before = _place(shown, number, window.line, before), window.line
        yield _next(window, where, listed=True)
        number += 1
        if not window.take(","):
            break
    if not window.take("]"):
        end = f"goes on with {window.peek()!a}" if window.peek() else "has no end"
        raise Unread(f"is not JSON (its list of rows {end})")


def _place(shown: str, number: int, line: int, before: int) -> str:
    """The line on which a row begins; its number where the row before begins there, too."""
    return f"{shown}#{number}" if line == before else f"{shown}:{line}"


def _next(window: Window, where: str, *, listed: bool) -> RawRow:
    try:
        return _row(where, window.value(), within=" in a list of rows" if listed else "")
    except Unread as error:
        window.skip(listed=listed)
        return RawRow(where, None, str(error))


# ---- an object around a list of rows: {"version": 1, "data": [{...}, ...]}


def _around(window: Window) -> str | None:
    """The key of the list of rows in the file's one object, "" for its first list; None where the object is a row.

    Raises:
        Unread: It has several lists of rows.
    """
    try:
        value = window.ahead(LONGEST)
    except TooLong:
        return ""
    except Unread:
        return None
    if not is_mapping(value) or not window.is_last or not OF_ROWS.isdisjoint(value):
        return None
    lists = [name for name, inner in value.items() if _is_list_of_rows(inner)]
    if len(lists) > 1:
        raise Unread(_several(lists))
    return lists[0] if lists else None


def _is_list_of_rows(value: Any) -> bool:
    if not is_list(value) or not value:
        return False
    return all(is_mapping(item) and not any(name in item for name in SPEAKER) for item in value)


def _several(names: list[str]) -> str:
    listed = ", ".join(names)
    return f"is an object with several lists of rows, {listed}: write the one that is meant into a file of its own"


def _inside(window: Window, shown: str, name: str) -> Iterator[RawRow]:
    """Rows of the list with this key, of the first list of objects where it is ""; the other values are passed over.

    Raises:
        Unread: The object breaks off; it has a second list of rows.
    """
    read: list[str] = []
    window.take("{")
    while True:
        key = window.value()
        if not isinstance(key, str) or not window.take(":"):
            raise Unread("is not JSON (a key without a value)")
        if key == name or (not name and window.starts_rows()):
            read.append(key)
            if len(read) > 1:
                raise Unread(_several(read))
            yield from _listed(window, shown)
        else:
            window.value()
        if not window.take(","):
            break
    if not window.take("}"):
        raise Unread("is not JSON (the object around its rows has no end)")
    if not read:
        raise Unread(f"is one object of more than {LONGEST >> 20} MiB without a list of rows")
