"""What only reading every row shows: malformed rows, equal rows in two groups, empty sides, too little to calibrate."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from recipes.checks.gate import gate_warnings
from recipes.checks.scorers import row_problems
from recipes.data.files import FolderChoice
from recipes.data.formats import TEXT
from recipes.data.origin import Origin
from recipes.data.rows import Row, Rows, Side, content_hash, drawn, first_lines, malformed, read_origin, side
from recipes.data.schema import Data
from recipes.data.texts import plain_texts
from recipes.data.turns import Message
from recipes.models.headers import read_headers
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
        torn: Equal rows of two groups, by line.
    """

    rows: dict[Side, list[Row]]
    duplicates: int
    not_drawn: int
    torn: list[str]


def check_data(loaded: Loaded) -> RowCheck:
    """Read every row: malformed ones, equal ones in two groups, empty sides, too little to calibrate on.

    A malformed first row and a missing or empty file are left out: `check` reports them.
    """
    remote = [source.path for source, path in zip(loaded.recipe.data.parts, loaded.data, strict=True) if path is None]
    not_read = {"data": f"{', '.join(remote)} is not local: its rows are read when it is pinned"} if remote else {}
    if not loaded.origins:
        return RowCheck([], not_read)
    origins = list(loaded.origins.values())
    reads = [read_origin(origin) for origin in origins]
    problems = list(_malformed_rows(origins, reads))
    rows = [row for read in reads for row in read.rows]
    sides = split_rows(rows, loaded.recipe.data)
    held_out = [*sides.rows["dev"], *sides.rows["test"]]
    problems += [*_torn(loaded, sides), *_general_rows(loaded), *row_problems(loaded, rows, held_out)]
    if len(origins) == len(loaded.data) and all(read.rows and not read.wrong for read in reads):
        problems += [*_empty_sides(loaded, sides), *_calibration(loaded, sides)]  # the sides are known only then
    summary = _summary(loaded, sides) | {"format": formats(origins, reads)} | not_read
    warnings = () if not_read else gate_warnings(loaded.recipe, sides.rows)
    return RowCheck([*map(loaded.placed, problems)], summary, tuple(map(loaded.placed, warnings)))


def formats(origins: Sequence[Origin], reads: Sequence[Rows]) -> str:
    """`messages, detected from rows.jsonl:1`, one per source."""
    return "; ".join(
        f"{read.format}, "
        + (f"detected from {read.detected_from}" if origin.format == "auto" else "named in the recipe")
        for origin, read in zip(origins, reads, strict=True)
    )


def _malformed_rows(origins: Sequence[Origin], reads: Sequence[Rows]) -> Iterator[Problem]:
    for origin, read in zip(origins, reads, strict=True):
        by_check = set(read_origin(origin, max_rows=1).wrong)  # `check` reads the first row
        if wrong := [row for row in read.wrong if row not in by_check]:
            yield malformed([origin.path], wrong)


def split_rows(rows: Sequence[Row], data: Data) -> Sides:
    """The split that prepare will make, less rows that turn out too long."""
    seen: dict[str, tuple[str, Row]] = {}
    sides: dict[Side, list[Row]] = {"train": [], "dev": [], "test": []}
    torn: list[str] = []
    not_drawn = 0
    for row in rows:
        name, group = row.name, row.group(data.group_column)
        if name in seen:
            before, first = seen[name]
            if before != group:
                torn.append(f"{first.where} ({before}) and {row.where} ({group})")
            continue
        seen[name] = (group, row)
        of_group = side(group, salt=data.salt, dev=data.dev, test=data.test)
        if of_group == "train" and not drawn(name, weight=row.origin.weight, salt=data.salt):
            not_drawn += 1
        else:
            sides[of_group].append(row)
    return Sides(rows=sides, duplicates=len(rows) - len(seen), not_drawn=not_drawn, torn=torn)


def _torn(loaded: Loaded, sides: Sides) -> Iterator[Problem]:
    if sides.torn:
        yield Problem(
            what=f"{len(sides.torn)} rows equal an earlier row of another group: a test row could equal a train row.",
            where="data.group",
            why=f"Groups keep related rows on one side; these have two groups:{first_lines(sides.torn)}",
            next=f"Give equal rows one value of `{loaded.recipe.data.group_column}`, or remove one of each pair.",
        )


def general_files(loaded: Loaded) -> dict[str, Path]:
    """Files of general text by field: what is evaluated, and what controls calibrate on."""
    recipe = loaded.recipe
    paths = {"data.general": recipe.data.general, "calibrate.general": recipe.calibrate.general}
    return {field: loaded.resolve(path) for field, path in paths.items() if path is not None}


def _general_rows(loaded: Loaded) -> Iterator[Problem]:
    """Bad rows of general text after the first, which `check` reads; texts in both calibration and evaluation."""
    files = general_files(loaded)
    problems = [
        problem
        for path in files.values()
        if path.exists() and not general_problems(path, max_rows=1)
        for problem in general_problems(path)
    ]
    yield from problems
    if len(files) == 2 and not problems and all(path.exists() for path in files.values()):
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
    return {content_hash([{"role": TEXT, "content": row.text}]) for row in plain_texts(path) if row.text is not None}


def general_problems(path: Path, *, max_rows: int | None = None) -> list[Problem]:
    """Rows of general text that have no `text`; the first 20 by place."""
    wrong: list[str] = []
    count = 0
    try:
        for where, _, why in islice(plain_texts(path), max_rows):
            count += 1
            wrong += [f"{where} {why}"] if why else []
    except FolderChoice as choice:
        return [choice.problem(shown(path), written="nowhere")]
    if count and not wrong:
        return []
    place = (path.parent if path.is_file() else path) / (wrong[0].split(" ", 1)[0] if wrong else "")
    return [
        Problem(
            what=f"{len(wrong)} malformed rows in the general text." if wrong else "The general text is empty.",
            where=shown(place if wrong else path),
            why=f"Each row is one text:{first_lines(wrong)}" if wrong else "Its text is measured or calibrated on.",
            next='Give it rows with a column `text`, such as lines {"text": "..."}, or leave the field out.',
        )
    ]


def _empty_sides(loaded: Loaded, sides: Sides) -> Iterator[Problem]:
    data = loaded.recipe.data
    for name in ("dev", "test"):
        if not sides.rows[name]:
            yield Problem(
                what=f"{name} would have no rows.",
                where=f"data.{name}",
                why=f"Groups fall on a side by their hash; shares are dev {data.dev:g} and test {data.test:g}.",
                next=f"Give more rows or finer groups, raise data.{name}, or draw again by another data.salt.",
            )


def _calibration(loaded: Loaded, sides: Sides) -> Iterator[Problem]:
    recipe, train = loaded.recipe, sides.rows["train"]
    if len(train) < recipe.calibrate.rows:
        enough = len(train) >= LEAST_ROWS
        yield Problem(
            what=f"train has {len(train)} rows; calibration asks for {recipe.calibrate.rows}.",
            where="calibrate.rows",
            why=f"Calibration rows come from train only, and fewer than {LEAST_ROWS} starve the Hessian.",
            next=f"Set calibrate.rows to {len(train)}."
            if enough
            else f"Give at least {least_rows(recipe.data.dev, recipe.data.test)} rows in all.",
        )
        return
    yield from _shares(loaded, train)
    needed = TOKENS_PER_INPUT * _widest(loaded)
    largest = sorted((token_bound(row.messages) for row in train), reverse=True)[: recipe.calibrate.rows]
    if sum(largest) < needed:
        rows = math.ceil(needed * len(largest) / sum(largest))
        yield Problem(
            what=f"Calibration needs {needed} tokens; {recipe.calibrate.rows} rows have {sum(largest)} at most.",
            where="calibrate.rows",
            why=f"With fewer than {TOKENS_PER_INPUT} tokens per input, the widest layer's Hessian is badly estimated.",
            next=f"Raise calibrate.rows to {rows} or more." if rows <= MOST_ROWS else "Give longer rows.",
        )


def _shares(loaded: Loaded, train: Sequence[Row]) -> Iterator[Problem]:
    """Shares for domains that train does not have, or has too few rows of."""
    stratify, rows = loaded.recipe.calibrate.stratify, loaded.recipe.calibrate.rows
    if not isinstance(stratify, dict):
        return
    sizes = Counter(row.domain(loaded.recipe.data.domain_column) for row in train)
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


def token_bound(messages: Sequence[Message]) -> int:
    """An upper bound of the turns' tokens: one per byte, and 32 for the template around each turn."""
    calls = (json.dumps(turn["tool_calls"]) for turn in messages if turn.get("tool_calls"))
    return sum(len((turn.get("content") or "").encode()) + 32 for turn in messages) + sum(map(len, calls))


def _widest(loaded: Loaded) -> int:
    """Inputs of the base's widest quantized layer; 0 where the base cannot be read here."""
    base = loaded.base
    try:
        return read_headers(base).largest_in_features if base and base.is_dir() else 0
    except RecipeError:
        return 0


def _summary(loaded: Loaded, sides: Sides) -> dict[str, Any]:
    data = loaded.recipe.data
    counts: dict[str, Any] = {"rows": sum(map(len, sides.rows.values())), "duplicates": sides.duplicates}
    if sides.not_drawn:
        counts["left out by weight"] = sides.not_drawn
    for name, rows in sides.rows.items():
        counts[name] = {"rows": len(rows)}
        if data.domain_column or any(source.domain for source in data.parts):
            domains = Counter(row.domain(data.domain_column) for row in rows)
            counts[name]["domains"] = dict(sorted(domains.items()))
    return counts
