"""How names and values go into MLflow: what it takes of letters and lengths, and nothing lost where it takes less."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.entities import Metric

PARAM_CHARS = 6000
NAME_CHARS = 250
TAG_CHARS = 8000


def point(event: Mapping[str, Any]) -> Metric:
    """A child's event as a point of a curve."""
    return Metric(key=event["name"], value=event["value"], timestamp=int(event["t"] * 1000), step=event["step"])


def param_text(value: Any) -> str:
    """Lists as JSON with sorted keys: a recipe that was read back says the same."""
    text = json.dumps(value, sort_keys=True) if isinstance(value, list) else str(value)
    return text.replace("\0", "\\0")  # PostgreSQL takes no NUL


def _name(text: str) -> str:
    """MLflow takes 250 letters, digits and `_ - . space : /`, and nothing that leads elsewhere as a path."""
    plain = "".join(char if char.isalnum() or char in "_-. :/" else "_" for char in text)
    whole = "/".join(re.sub(r"^\.+", "_", part) or "_" for part in plain.split("/"))
    return whole[:NAME_CHARS].rstrip("/")


def names_of(keys: Iterable[str]) -> dict[str, str]:
    """Key -> MLflow's name. Keys that would share one (`a?b` and `a*b`) keep apart by a part of their digest."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        name = _name(key)
        if name in taken:
            mark = f"-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            name = f"{name[: NAME_CHARS - len(mark)]}{mark}"
        names[key] = name
        taken.add(name)
    return names


def cut(text: str, most: int) -> str:
    """As long as MLflow takes it; one that was cut says so. recipe.yaml beside it is whole."""
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def flat(values: Mapping[str, Any], *, separator: str = ".", before: str = "") -> dict[str, Any]:
    """Nested keys as one: {"a": {"b": 1}} becomes {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key or 'none'}"
        if isinstance(value, Mapping):
            leaves |= flat(value, separator=separator, before=f"{name}{separator}")
        else:
            leaves[name] = value
    return leaves
