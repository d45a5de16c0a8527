"""What JSON and YAML give: type guards, and a file that may hold anything. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard


def is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    """True for an object of JSON, a mapping of YAML."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """True for a list."""
    return isinstance(value, list)


LARGEST = 1 << 40  # of what config.json counts: products of such sizes still are numbers that can be printed

# What reading JSON raises. ValueError: it is not UTF-8 or not JSON, or an integer has more than 4,300 digits, Python's
# limit. RecursionError: it is nested some 1,000 levels deep.
NOT_JSON = (ValueError, RecursionError)


def json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, no JSON or no object."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *NOT_JSON):
        return None
    return value if is_mapping(value) else None


def number_of(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these keys that holds a whole number above zero that a model can have."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 < value <= LARGEST), None)
