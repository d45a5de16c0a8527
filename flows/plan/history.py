"""How long steps took before, by this home's own runs; nothing is guessed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from flows.plan.machine import Memory
from tasks.runtime.step import hardware
from tasks.runtime.store.local import StoreTrouble, read_json

ALIKE = 0.05  # of a card's memory: sellers and drivers count it a little differently (79.6 GiB of an "80 GB" card)
NAMED = ("train", "reference")  # stages whose slug is the recipe's name


class Seconds(NamedTuple):
    """Seconds that a step would take, by the median of n earlier ones."""

    seconds: float
    n: int


def same_recipe(home: Path, name: str) -> dict[str, float]:
    """Seconds of the steps that runs of this recipe made here, on a machine like this one, by key; the latest count.

    Args:
        home: QUENCH_HOME; it need not exist.
        name: The recipe's.
    """
    found: dict[str, float] = {}
    here = hardware()
    for folder in sorted((home / "runs").glob("[0-9]*/")):
        run = _json(folder / "steps.json")
        if run.get("name") == name and run.get("hardware") == here:
            found |= {step["key"]: step["seconds"] for step in run["steps"] if step["status"] == "made"}
    return found


def seconds(home: Path, *, base: str, memory: Memory, tokens: Mapping[str, float]) -> dict[str, Seconds]:
    """Of the steps that were made before from this base on a GPU with as much memory, scaled by tokens, by key.

    Args:
        home: QUENCH_HOME; it need not exist.
        base: The base as the recipe names it, or its folder.
        memory: The machine.
        tokens: Of each step now, by key.
    """
    rates: dict[str, dict[str, float]] = defaultdict(dict)  # stage and arm -> artifact -> seconds a token
    for folder in sorted((home / "runs").glob("*/")):
        run, predicted = _json(folder / "steps.json"), _json(folder / "preflight.json")
        if not (_of_base(run, base) and _alike(predicted, memory)):
            continue
        for step in run.get("steps", []):
            then = predicted.get("steps", {}).get(step["key"], {}).get("tokens")
            manifest = _json(home / step["path"] / "manifest.json") if step["path"] else {}
            if then and manifest.get("execution", {}).get("device") == "cuda":
                rates[_kind(step["key"])][step["path"]] = manifest["seconds"] / then
    return {
        key: Seconds(count * median(found.values()), len(found))
        for key, count in tokens.items()
        if count and (found := rates.get(_kind(key)))
    }


def _kind(key: str) -> str:
    stage = key.partition("/")[0]
    return stage if stage in NAMED else key


def _of_base(run: Mapping[str, Any], base: str) -> bool:
    """The same folder, or the same hub id, whatever the commit."""
    origin = run.get("base") or {}
    return base == origin.get("path") or base == str(origin.get("source")).partition("@")[0]


def _alike(predicted: Mapping[str, Any], memory: Memory) -> bool:
    """The run had a GPU with as much memory."""
    total = predicted.get("gpu_total_gib")
    return total is not None and memory.gpu_gib is not None and abs(total / memory.gpu_gib - 1) <= ALIKE


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing of one that is not there, as in a run that was ended early, or of a newer Quench."""
    try:
        return read_json(path)
    except (FileNotFoundError, json.JSONDecodeError, StoreTrouble):
        return {}
