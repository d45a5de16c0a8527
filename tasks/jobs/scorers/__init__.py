"""How an answer is scored: one module a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """A score from 0 to 1, and why an answer could not be scored as it stands."""

    score: float
    error: str = ""


Scorer = Callable[[str, str, Mapping[str, Any]], Verdict]
"""(answer, reference, the row's other columns) -> Verdict."""


def make_scorer(params: Mapping[str, Any], databases: Path | None) -> Scorer:
    """The scorer that a recipe's `evaluate.scorer` names.

    Args:
        params: Dump of schema.Scorer.
        databases: Folder with one SCHEMA.sql a database, for sql-execution.
    """
    from tasks.jobs.scorers.exact_match import exact_match
    from tasks.jobs.scorers.sql_execution import SqlExecution

    if params["kind"] == "sql-execution" and databases is not None:
        return SqlExecution(databases, column=params["schema_column"])
    if params["kind"] == "exact-match":
        return exact_match
    raise ValueError(f"no scorer {params['kind']} (databases: {databases})")
