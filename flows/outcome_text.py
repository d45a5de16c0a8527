"""The report's later parts in a sentence each, for its first lines: the gate and the waterfall.

The parts may be missing from report.json: then nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.metrics import significant
from flows.plot_waterfall import signed


def gate_sentence(gate: Mapping[str, Any] | None) -> str | None:
    """The gate's first sentence; where the candidate does not pass, also the check that weighs most against it."""
    if not gate:
        return None
    return " ".join(gate["text"][: 2 if gate["outcome"] in ("worse", "undecided") else 1])


def waterfall_sentence(waterfall: Mapping[str, Any] | None) -> str | None:
    """The arm that loses least, step by step."""
    whole = [path for path in (waterfall or {}).get("paths", []) if path["steps"] and not path.get("reason")]
    if not waterfall or not whole:
        return None
    path = min(whole, key=lambda one: sum(step["difference"] for step in one["steps"]))
    steps = ", ".join(
        f"{step['step']} {signed(step['difference'], step['ci95_adjusted'])} ({step['verdict']})"
        for step in path["steps"]
    )
    total = sum(step["difference"] for step in path["steps"])
    start = path["steps"][0]["from"]
    return (
        f"{path['arm']} loses least against {start}: {significant(total, 2)} {waterfall['unit']} on "
        f"{waterfall['split']} ({steps})."
    )
