"""The file of `quench audit`: a CSV file as spreadsheets, people and Markdown write it, as lines with known columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.problem import Problem, RecipeError, shown

NAMES = {
    "name": ("name", "model", "method", "claim", "run", "arm"),
    "metric": ("metric", "task", "benchmark", "dataset"),
    "n": ("n", "questions", "samples", "examples", "rows", "items", "documents", "count"),
    "score": ("score", "accuracy", "acc", "value", "result"),
    "base score": ("base score", "base", "baseline", "baseline score", "reference", "reference score"),
    "lost score": ("lost score", "lost", "score after the loss"),
    "difference": ("difference", "gain", "delta"),
    "recovery": ("recovery", "recovered"),
    "sd": ("sd", "std", "stdev", "standard deviation"),
    "base sd": ("base sd", "base std", "base standard deviation"),
}
SHARES = ("score", "base score", "lost score")  # columns that are one unit throughout
WANTED = "name, metric, n, score, base score; where they are known also lost score, recovery, difference, sd"
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the file: cells by the name of what they are; empty ones are left out."""

    number: int
    cells: Mapping[str, str]


def text_of(path: Path) -> str:
    """The file as text.

    Raises:
        RecipeError: It cannot be read, is in another encoding, or empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        why = error.strerror or str(error)
        raise problem_at(path, "The table cannot be read.", why, "Name a CSV file.").error() from None
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise problem_at(
            path,
            "The table is no UTF-8 text.",
            f"A byte there (0x{data[error.start]:02x}) is none; another encoding would have to be guessed.",
            "Save it as CSV UTF-8.",
            line=line,
        ).error() from None
    if not text.strip():
        why, advice = "There is no claim in it.", f"Give it the columns {WANTED}."
        raise problem_at(path, "The table is empty.", why, advice).error()
    return text


def lines_of(path: Path, text: str) -> tuple[list[Line], list[str], list[str | None]]:
    """Rows with the header's names and what each column is; None for a column that nothing reads."""
    first = next(line for line in text.splitlines() if line.strip())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=first.count), strict=True)
    header: list[str] | None = None
    columns: list[str | None] = []
    lines: list[Line] = []
    wrong: list[Problem] = []
    try:
        for cells in reader:
            if not any(cell.strip(" -:") for cell in cells):  # blank, or the line below a Markdown table's header
                continue
            if header is None:
                header, columns = cells, _columns(path, cells, reader.line_num)
            elif len(cells) != len(header):
                wrong.append(_cell_count(path, reader.line_num, cells, header))
            else:
                lines.append(Line(number=reader.line_num, cells=_read(header, columns, cells)))
    except csv.Error as error:
        why, advice = f"It is no CSV from there on: {error}.", "Close the quotes of that line."
        wrong.append(problem_at(path, "The table cannot be read to its end.", why, advice, line=reader.line_num))
    if not wrong and not lines:
        wrong.append(
            problem_at(path, "The table has no rows.", "There is a header alone.", "Add a row for each claim.")
        )
    if wrong:
        raise RecipeError(wrong)
    return lines, header or [], columns


def _read(header: Sequence[str], columns: Sequence[str | None], cells: Sequence[str]) -> dict[str, str]:
    """Cells by what they are, without empty ones; a % sign in the header stands behind every number below it."""
    read: dict[str, str] = {}
    for name, column, cell in zip(header, columns, cells, strict=True):
        text = cell.strip()
        if column and text:
            behind = " %" if "%" in name and column in (*SHARES, "difference", "recovery") and "%" not in text else ""
            read[column] = text + behind
    return read


def _cell_count(path: Path, line: int, cells: Sequence[str], header: Sequence[str]) -> Problem:
    why = f"It has {len(cells)} cells, the header has {len(header)}."
    advice = 'Put quotes around a cell with a comma in it ("1,319"), and write a cell for every column.'
    return problem_at(path, "A row does not fit the header.", why, advice, line=line)


def _columns(path: Path, header: Sequence[str], line: int) -> list[str | None]:
    """What each column is.

    Raises:
        RecipeError: Two of them could be the same, or what is needed is not there.
    """
    plain = [" ".join(re.sub(r"\(.*?\)|[_\-.%,]+", " ", name.lower()).split()) for name in header]
    columns: list[str | None] = [None] * len(header)
    for wanted, names in NAMES.items():
        places = [place for name in names for place, given in enumerate(plain) if given == name]
        exact = [place for place in places if plain[place] == wanted]
        if len(exact) > 1 or (not exact and len(places) > 1):
            both = " and ".join(f"`{header[place].strip()}`" for place in sorted(places))
            why, advice = f"{both} could each be it.", f"Name one of them `{wanted}`, and the other otherwise."
            raise problem_at(path, f"Two columns could be the {wanted}.", why, advice, line=line).error()
        if places:
            columns[(exact or places)[0]] = wanted
    lacking = [name for name in ("n", "score", "base score") if name not in columns]
    if "difference" in columns:
        lacking = [name for name in lacking if name == "n"]
    if lacking:
        read = ", ".join(f"`{name.strip()}`" for name in header)
        raise problem_at(
            path,
            f"The table has no column {' and no column '.join(lacking)}.",
            f"Its header says {read}.",
            f"Wanted are {WANTED}.",
            line=line,
        ).error()
    return columns


def problem_at(path: Path, what: str, why: str, advice: str, *, line: int | None = None, column: str = "") -> Problem:
    """What is wrong with a table, a line or a cell."""
    where = shown(path) + (f":{line}" if line else "") + (f" {column}" if column else "")
    return Problem(what=what, where=where, why=why, next=advice)
