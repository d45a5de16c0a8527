"""How `quench init` reads a data file: as it is, else by the column names that the field uses, which it writes down.

What it cannot tell by itself can be given: `--set 'data.columns={prompt: frage, completion: antwort}'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.data.files import FolderChoice, raw_rows
from recipes.data.formats import propose
from recipes.data.origin import origins
from recipes.data.rows import Rows, read_origin
from recipes.data.schema import Data
from recipes.problem import Problem, RecipeError
from recipes.read.complaints import explain
from recipes.read.merge import Merged, override
from recipes.section import Section

SETTABLE = ("columns", "keep", "drop_reasoning", "config", "split", "format", "group", "domain")


class _DataAlone(Section):
    """A recipe of which only this section is looked at."""

    data: Data


@dataclass(frozen=True, kw_only=True)
class ReadData:
    """The rows of a data file, and the fields of `data` by which they were read.

    Attributes:
        rows: As they were read.
        data: The section.
        proposed: Whether data.columns is a proposal of ours.
    """

    rows: Rows
    data: Data
    proposed: bool = False


def read_data(path: Path, *, sets: Sequence[str] = ()) -> ReadData:
    """Read the rows by the fields that are given, else by column names that the field uses.

    Raises:
        RecipeError: A `--set` is no field of the data, or its value cannot be taken.
    """
    given = _given(path, sets)
    data = _section(given)
    rows = _rows(path, data)
    if rows.rows or data.columns or data.format != "auto":
        return ReadData(rows=rows, data=data)
    try:
        raws = raw_rows(path, config=data.config, split=data.split)
        raw = next((row.values for row in raws if row.values is not None), None)
    except FolderChoice:  # among the problems of the rows
        raw = None
    columns = propose(raw) if raw and rows.format is None else None
    if not columns:
        return ReadData(rows=rows, data=data)
    proposed = _section(given | {"columns": columns})
    again = _rows(path, proposed)
    return ReadData(rows=again, data=proposed, proposed=True) if again.rows else ReadData(rows=rows, data=data)


def _rows(path: Path, data: Data) -> Rows:
    """All rows, whatever group or domain they have: init looks for both."""
    source = data.parts[0].model_dump() | {"domain": None}
    (origin,) = origins([path], [source], domain=None, group=None)
    return read_origin(origin)


def _given(path: Path, sets: Sequence[str]) -> dict[str, Any]:
    merged = Merged({"data": {"path": str(path)}}, {}, [])
    problems: list[Problem] = []
    for item in sets:
        name = item.partition("=")[0].split(".")
        if len(name) < 2 or name[0] != "data" or name[1] not in SETTABLE:
            problems.append(
                Problem(
                    what=f"`--set {item}` is nothing that init takes.",
                    where=f"--set {item}",
                    why="Init chooses the rest; here only what the rows mean can be said.",
                    next=f"Set one of {', '.join(f'data.{field}' for field in SETTABLE)}; edit the recipe for others.",
                )
            )
            continue
        try:
            override(merged, item, folder=Path.cwd())
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return merged.values["data"] | {"path": str(path)}


def _section(values: dict[str, Any]) -> Data:
    try:
        return _DataAlone.model_validate({"data": values}, strict=True).data
    except ValidationError as error:
        raise RecipeError(complaint.problem for complaint in explain(error, {"data": values})) from None
