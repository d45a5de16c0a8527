"""The answer is JSON that a JSON schema accepts (jsonschema; the draft that `$schema` names, else the newest)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for

from tasks.jobs.scorers import Verdict
from tasks.runtime.process.errors import StageError


class JsonSchemaScorer:
    """Scores answers against one schema file."""

    def __init__(self, path: Path, *, equal: bool) -> None:
        """Read the schema.

        Args:
            path: The schema file.
            equal: An answer also has to be the same JSON value as the reference.

        Raises:
            StageError: The file holds no JSON schema.
        """
        schema = json.loads(path.read_text(encoding="utf-8"))
        kind = validator_for(schema)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            raise StageError.of(
                what=f"{path.name} is not a JSON schema",
                where=f"{path}, at {error.json_path}",
                why=error.message,
                next="correct it; `$schema` names the draft that it is read as",
            ) from None
        self._validator = kind(schema)
        self._equal = equal

    def __call__(self, answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
        """1 where the answer, and nothing around it, is JSON that the schema accepts."""
        try:
            value = strict_json(answer)
        except (ValueError, RecursionError) as error:
            return Verdict(0.0, f"no JSON: {error}")
        wrong = best_match(self._validator.iter_errors(value))
        if wrong is not None:
            return Verdict(0.0, f"{wrong.json_path}: {wrong.message}")
        if not self._equal:
            return Verdict(1.0)
        try:
            return Verdict(float(same(value, strict_json(reference))))
        except (ValueError, RecursionError) as error:
            return Verdict(0.0, f"the reference is no JSON: {error}")


def strict_json(text: str) -> Any:
    """A JSON value; NaN and Infinity, which Python would read, and a name that stands twice are refused.

    Raises:
        ValueError: It is not JSON.
    """
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)


def same(a: Any, b: Any) -> bool:
    """Equal as JSON values: 1 is 1.0, true is not 1, the order of names counts for nothing."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(left, right) for left, right in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return value
