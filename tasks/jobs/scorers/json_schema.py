"""The answer is JSON that a JSON schema accepts (jsonschema; the draft that `$schema` names, else the newest).

A schema that refers to another file or address is refused: jsonschema would fetch it, from wherever it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable

from tasks.jobs.scorers import Verdict
from tasks.runtime.bounds import OverBounds, bounds
from tasks.runtime.process.errors import StageError

SECONDS, MIB = 10.0, 512  # of one answer: patterns of a schema can take for ever, an answer of 4,000 tokens takes 1 ms


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
        try:
            schema = json.loads(path.read_text(encoding="utf-8"))
            kind = validator_for(schema)
            kind.check_schema(schema)
        except SchemaError as error:
            raise _no_schema(path, f"{path}, at {error.json_path}", error.message) from None
        except (ValueError, RecursionError) as error:
            raise _no_schema(path, str(path), str(error)) from None
        self._path = path
        self._validator = kind(schema, registry=REGISTRY)  # of the drafts' own schemas; without it, whatever is named
        self._equal = equal

    def __call__(self, answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
        """1 where the answer, and nothing around it, is JSON that the schema accepts.

        Raises:
            StageError: The schema refers to what is not in it.
        """
        try:
            with bounds(seconds=SECONDS, mib=MIB):
                return self._verdict(answer, reference)
        except OverBounds as error:
            return Verdict(0.0, f"to check it takes {error}")
        except RecursionError:
            return Verdict(0.0, "it is nested too deeply, or the schema refers to itself without end")
        except Unresolvable as error:
            why = f"it refers to {error.ref}, which is not in it; no other file or address is read"
            raise _no_schema(self._path, str(self._path), why) from None

    def _verdict(self, answer: str, reference: str) -> Verdict:
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


def _no_schema(path: Path, where: str, why: str) -> StageError:
    return StageError.of(
        what=f"{path.name} is not a JSON schema",
        where=where,
        why=why,
        next="correct it; `$schema` names the draft that it is read as",
    )


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
