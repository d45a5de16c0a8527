"""Identity of a step: canonical JSON, sha256. What has no stable form is refused with its path, never str()-ed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

CHUNK = 1 << 22


class UnstableValue(TypeError):
    """A value in a step's identity has no canonical form."""


def canonical(value: Any, *, path: str = "identity") -> Any:
    """Return `value` as plain JSON types in one stable form.

    Args:
        value: None, bool, int, finite float, str, list, tuple, mapping with str keys or pydantic model.
        path: Where the value stands, for the error.

    Raises:
        UnstableValue: Anything else (sets, paths, callables, NaN ...), with the path of the value.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UnstableValue(f"{path}: {value} is not a finite number")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, BaseModel):
        return canonical(value.model_dump(mode="python"), path=path)
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        for key in mapping:
            if not isinstance(key, str):
                raise UnstableValue(f"{path}: key {key!r} is not a string")
        return {key: canonical(mapping[key], path=f"{path}.{key}") for key in sorted(mapping)}
    if isinstance(value, list | tuple):
        return [canonical(one, path=f"{path}[{i}]") for i, one in enumerate(cast("Sequence[Any]", value))]
    raise UnstableValue(f"{path}: a {type(value).__name__} has no stable form")


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `identity`."""
    text = json.dumps(canonical(identity), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def difference(old: Any, new: Any, *, path: str = "") -> list[str]:
    """Paths at which two identities differ, as `path: old -> new`, for the plan."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
        found: list[str] = []
        for key in sorted(before.keys() | after.keys()):
            found += difference(before.get(key), after.get(key), path=f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    if isinstance(value, str) and len(value) == 64:  # a digest
        return value[:12]
    return text if len(text) <= 60 else text[:57] + "..."
