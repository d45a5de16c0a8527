"""Tables in Markdown, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.results.metrics import absent_text, interval_text, value_text


def cell_text(metric: str, cell: Mapping[str, Any], *, joint: str = " ") -> str:
    """A metric's value and interval, with `joint` between them; what stands there where it has none."""
    if cell["value"] is None:
        return absent_text(cell.get("reason"))
    text = value_text(metric, cell["value"], cell["ci95"])
    interval = interval_text(metric, cell["value"], cell["ci95"])
    return f"{text}{joint}{interval}" if interval else text


def escaped(text: str) -> str:
    """A text in which no bar ends the cell of a Markdown table."""
    return text.replace("|", "\\|")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table with padded columns, so that it can be read as it is."""
    rows = [[escaped(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]
    right = [name.endswith(("↓", "↑")) or name in ("difference", "seconds") for name in head]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, right, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    yield line(head)
    yield line(["-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, right, strict=True)])
    yield from (line(row) for row in rows)
