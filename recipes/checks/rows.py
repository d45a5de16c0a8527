"""What only reading every row shows: malformed rows, equal rows in two groups, empty sides, too little to calibrate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from recipes.checks.gate import gate_warnings
from recipes.checks.scorers import ScoredRows
from recipes.checks.split import SideCounts, Split
from recipes.data.formats import TEXT
from recipes.data.origin import Origin
from recipes.data.rows import Row, RowReader, Side, content_hash, first_lines, malformed, read_origin
from recipes.data.schema import Data
from recipes.data.wrong import Wrong
from recipes.models.headers import read_headers
from recipes.plain import is_mapping
from recipes.problem import Problem, RecipeError, shown
from recipes.read.load import Loaded
from recipes.schema import LEAST_ROWS, MOST_ROWS, TOKENS_PER_INPUT


class RowCheck(NamedTuple):
    """Problems of the rows, their summary (JSON-able), and warnings of what they are too few for."""

    problems: list[Problem]
    summary: dict[str, Any]
    warnings: tuple[Problem, ...] = ()


@dataclass(kw_only=True)
class Sides:
    """Distinct rows on the sides of the split.

    Attributes:
        rows: By side.
        duplicates: Rows that equal an earlier one.
        not_drawn: Train rows that the weight of their source leaves out.
    """

    rows: dict[Side, list[Row]]
    duplicates: int
    not_drawn: int


def split_rows(rows: Sequence[Row], data: Data) -> Sides:
    """The split that prepare will make, less rows that turn out too long."""
    split = Split(data)
    sides: dict[Side, list[Row]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        if name := split.add(row):
            sides[name].append(row)
    return Sides(rows=sides, duplicates=split.duplicates, not_drawn=split.not_drawn)


class ReadSource(NamedTuple):
    """A source that was read to its end.

    Attributes:
        reader: What it says of its format.
        rows: Good rows.
        wrong: Malformed ones.
        problems: Why no row of it can be read.
    """

    reader: RowReader
    rows: int
    wrong: Wrong
    problems: list[Problem]


def check_data(loaded: Loaded) -> RowCheck:
    """Read every row once: malformed ones, equal ones in two groups, empty sides, too little to calibrate on.

    A malformed first row and a missing or empty file are left out: `check` reports them.
    """
    remote = [source.path for source, path in zip(loaded.recipe.data.parts, loaded.data, strict=True) if path is None]
    not_read = {"data": f"{', '.join(remote)} is not local: its rows are read when it is pinned"} if remote else {}
    if not loaded.origins:
        return RowCheck([], not_read)
    split, scored = Split(loaded.recipe.data, calibrated=loaded.recipe.calibrate.rows), ScoredRows(loaded)
    reads = [_read(origin, split, scored) for origin in loaded.origins.values()]
    problems = [problem for read in reads for problem in _new_problems(read)]
    problems += [*_torn(loaded, split), *_general_rows(loaded), *scored.problems()]
    if len(reads) == len(loaded.data) and all(read.rows and not read.wrong.count for read in reads):
        problems += [*_empty_sides(loaded, split), *_calibration(loaded, split)]  # the sides are known only then
    summary = _summary(loaded, split) | {"format": formats([read.reader for read in reads])} | not_read
    warnings = () if not_read else gate_warnings(loaded.recipe, split.sides)
    return RowCheck([*map(loaded.placed, problems)], summary, tuple(map(loaded.placed, warnings)))


def _read(origin: Origin, split: Split, scored: ScoredRows) -> ReadSource:
    """Show every row of a source to the split and the scorers; none is kept."""
    reader, wrong, problems, rows = RowReader(origin), Wrong(), list[Problem](), 0
    for row in reader:
        if isinstance(row, Row):
            rows += 1
            scored.add(row, side=split.add(row))
        elif row.problem is not None:
            problems.append(row.problem)
        else:
            wrong.add(str(row))
    return ReadSource(reader, rows, wrong, problems)


def formats(readers: Sequence[RowReader]) -> str:
    """`messages, detected from rows.jsonl:1`, one per source."""
    return "; ".join(
        f"{reader.format}, "
        + (f"detected from {reader.detected_from}" if reader.origin.format == "auto" else "named in the recipe")
        for reader in readers
    )


def _new_problems(read: ReadSource) -> Iterator[Problem]:
    """What is wrong with a source, but for what its first row shows: `check` says that."""
    first = read_origin(read.reader.origin, max_rows=1)
    lines = [line for line in read.wrong.lines if line not in first.wrong]
    if lines:
        yield malformed([read.reader.origin.path], lines, count=read.wrong.count - len(first.wrong))
    yield from (problem for problem in read.problems if problem not in first.problems)


def _torn(loaded: Loaded, split: Split) -> Iterator[Problem]:
    if not split.torn:
        return
    group, firsts = loaded.recipe.data.group_column, _rows_at(loaded, {torn.first for torn in split.torn})
    pairs = [f"{firsts[torn.first].where} ({firsts[torn.first].group(group)}) and {torn.later}" for torn in split.torn]
    yield Problem(
        what=f"{split.torn_rows} rows equal an earlier row of another group: a test row could equal a train row.",
        where="data.group",
        why=f"Groups keep related rows on one side; these have two groups:{first_lines(pairs, count=split.torn_rows)}",
        next=f"Give equal rows one value of `{group}`, or remove one of each pair.",
    )


def _rows_at(loaded: Loaded, numbers: set[int]) -> dict[int, Row]:
    """Good rows by their number over all sources, read again."""
    rows = (row for origin in loaded.origins.values() for row in RowReader(origin) if isinstance(row, Row))
    return {number: row for number, row in enumerate(islice(rows, max(numbers) + 1)) if number in numbers}


def general_files(loaded: Loaded) -> dict[str, Path]:
    """Files of general text by field: what is evaluated, and what controls calibrate on."""
    recipe = loaded.recipe
    paths = {"data.general": recipe.data.general, "calibrate.general": recipe.calibrate.general}
    return {field: loaded.resolve(path) for field, path in paths.items() if path is not None}


def _general_rows(loaded: Loaded) -> Iterator[Problem]:
    """Bad lines of general text after the first, which `check` reads; texts in both calibration and evaluation."""
    files = general_files(loaded)
    problems = [
        problem
        for path in files.values()
        if path.is_file() and not general_problems(path, max_rows=1)
        for problem in general_problems(path)
    ]
    yield from problems
    if len(files) == 2 and not problems and all(path.is_file() for path in files.values()):
        evaluated, calibrated = map(_texts, files.values())
        if shared := evaluated & calibrated:
            yield Problem(
                what=f"{len(shared)} texts are in calibrate.general and in data.general.",
                where="calibrate.general",
                why="ppl_general would be measured on what a control was calibrated on.",
                next="Remove them from one of the two files.",
            )


def _texts(path: Path) -> set[str]:
    """Hashes of the texts of a file."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {content_hash([{"role": TEXT, "content": json.loads(line)["text"]}]) for line in lines}


def general_problems(path: Path, *, max_rows: int | None = None) -> list[Problem]:
    """Lines of general text that are not `{"text": ...}`; the first 20 by number."""
    wrong: list[int] = []
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(islice(file, max_rows), start=1):
            count += 1
            try:
                row: object = json.loads(line) if line.strip() else {"text": ""}
            except (json.JSONDecodeError, UnicodeDecodeError):
                row = None
            if not is_mapping(row) or not isinstance(row.get("text"), str):
                wrong.append(number)
    if count and not wrong:
        return []
    numbers = ", ".join(map(str, wrong[:20])) + (f" and {len(wrong) - 20} more" if len(wrong) > 20 else "")
    return [
        Problem(
            what=f"{len(wrong)} malformed rows in the general text." if wrong else "The general text is empty.",
            where=f"{shown(path)}:{wrong[0]}" if wrong else shown(path),
            why=f"Lines {numbers} are not {{'text': '...'}}." if wrong else "Its text is measured or calibrated on.",
            next='Write one object with `text` per line: {"text": "..."}, or leave the field out.',
        )
    ]


def _empty_sides(loaded: Loaded, split: Split) -> Iterator[Problem]:
    data = loaded.recipe.data
    for name in ("dev", "test"):
        if not split.sides[name].rows:
            yield Problem(
                what=f"{name} would have no rows.",
                where=f"data.{name}",
                why=f"Groups fall on a side by their hash; shares are dev {data.dev:g} and test {data.test:g}.",
                next=f"Give more rows or finer groups, raise data.{name}, or draw again by another data.salt.",
            )


def _calibration(loaded: Loaded, split: Split) -> Iterator[Problem]:
    recipe, train = loaded.recipe, split.sides["train"]
    if train.rows < recipe.calibrate.rows:
        enough = train.rows >= LEAST_ROWS
        yield Problem(
            what=f"train has {train.rows} rows; calibration asks for {recipe.calibrate.rows}.",
            where="calibrate.rows",
            why=f"Calibration rows come from train only, and fewer than {LEAST_ROWS} starve the Hessian.",
            next=f"Set calibrate.rows to {train.rows}."
            if enough
            else f"Give at least {least_rows(recipe.data.dev, recipe.data.test)} rows in all.",
        )
        return
    yield from _shares(loaded, train)
    needed = TOKENS_PER_INPUT * _widest(loaded)
    largest = sum(split.largest)
    if largest < needed:
        rows = math.ceil(needed * len(split.largest) / largest)
        yield Problem(
            what=f"Calibration needs {needed} tokens; {recipe.calibrate.rows} rows have {largest} at most.",
            where="calibrate.rows",
            why=f"With fewer than {TOKENS_PER_INPUT} tokens per input, the widest layer's Hessian is badly estimated.",
            next=f"Raise calibrate.rows to {rows} or more." if rows <= MOST_ROWS else "Give longer rows.",
        )


def _shares(loaded: Loaded, train: SideCounts) -> Iterator[Problem]:
    """Shares for domains that train does not have, or has too few rows of."""
    stratify, rows = loaded.recipe.calibrate.stratify, loaded.recipe.calibrate.rows
    if not isinstance(stratify, dict):
        return
    sizes = train.domains
    for name, share in stratify.items():
        if sizes[name] < math.floor(share * rows):
            yield Problem(
                what=f"train has {sizes[name]} rows of the domain `{name}`; its share is {share:g} of {rows}.",
                where="calibrate.stratify",
                why="Given shares are kept exactly.",
                next=f"Lower its share or calibrate.rows; domains are {', '.join(sorted(sizes))}.",
            )


def least_rows(dev: float, test: float) -> int:
    """Rows of which about 128 fall on train."""
    return math.ceil(LEAST_ROWS / (1 - dev - test))


def _widest(loaded: Loaded) -> int:
    """Inputs of the base's widest quantized layer; 0 where the base cannot be read here."""
    base = loaded.base
    try:
        return read_headers(base).largest_in_features if base and base.is_dir() else 0
    except RecipeError:
        return 0


def _summary(loaded: Loaded, split: Split) -> dict[str, Any]:
    data = loaded.recipe.data
    counts: dict[str, Any] = {"rows": sum(side.rows for side in split.sides.values()), "duplicates": split.duplicates}
    if split.not_drawn:
        counts["left out by weight"] = split.not_drawn
    for name, side in split.sides.items():
        counts[name] = {"rows": side.rows}
        if data.domain_column or any(source.domain for source in data.parts):
            counts[name]["domains"] = dict(sorted(side.domains.items()))
    return counts
