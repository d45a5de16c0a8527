"""How an answer is scored: one module per kind of scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard


class Verdict(NamedTuple):
    """A score from 0 to 1, and why an answer could not be scored as it stands."""

    score: float
    error: str = ""


class ScorerFailed(Exception):
    """A scorer that could not say anything about an answer: the arm then has no score of it at all."""


Scorer = Callable[[str, str, Mapping[str, Any]], Verdict]
"""(answer, reference, the row's other columns) -> Verdict. Raises ScorerFailed."""


def is_share(value: Any) -> TypeGuard[float]:
    """True for a number from 0 to 1, of Python or numpy, and for a bool."""
    return isinstance(value, Real) and 0 <= float(value) <= 1


def make_scorer(params: Mapping[str, Any], content: Path | None) -> Scorer:
    """The scorer that an entry of `evaluate.scorers` names; not lm-eval, which asks for its own answers.

    Args:
        params: What recipes.scorers says of it, `params()`.
        content: The file or folder that it reads.

    Raises:
        StageError: That file is not what its kind needs.
    """
    from tasks.jobs.scorers.exact_match import exact_match
    from tasks.jobs.scorers.json_schema import JsonSchemaScorer
    from tasks.jobs.scorers.number import NumberScorer
    from tasks.jobs.scorers.python_callable import load_function
    from tasks.jobs.scorers.sql_execution import SqlExecutionScorer

    match params["kind"], content:
        case "exact-match", _:
            return exact_match
        case "number", _:
            return NumberScorer(params["pattern"], absolute=params["absolute"], relative=params["relative"])
        case "json-schema", Path():
            return JsonSchemaScorer(content, equal=params["match"] == "equal")
        case "sql-execution", Path():
            return SqlExecutionScorer(content, column=params["schema_column"])
        case "python", Path():
            return load_function(content, params["function"])
        case _:
            raise ValueError(f"no scorer {params['kind']} (it reads: {content})")
