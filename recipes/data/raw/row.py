"""A row as it is in its file, and why one cannot be read."""

from __future__ import annotations

from typing import Any, NamedTuple


class RawRow(NamedTuple):
    """One row as it is in its file.

    Attributes:
        where: `file:LINE`, or `file#ROW` where rows have no lines of their own.
        values: Its columns; None where it cannot be read.
        wrong: Why it cannot be read.
    """

    where: str
    values: dict[str, Any] | None
    wrong: str = ""


class Unread(ValueError):
    """A row cannot be read; the message says why, and continues the place of the row: `rows.jsonl:3 is not JSON`."""


def columns(values: dict[str, Any]) -> dict[str, Any]:
    """The columns that a row has: one without a value (null) is a column that it does not have."""
    if None in values.values():
        return {name: value for name, value in values.items() if value is not None}
    return values
