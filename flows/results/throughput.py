"""Speed of a real engine: what served.json timed at 1, 8 and 32 requests at once, and the order of the arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flows.results.cells import timed_cell

OUTPUT = "output_tokens_per_s"
RATES = ("prefill_tokens_per_s", OUTPUT)
TAIL = 0.95  # of the requests


def loads_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each load of served.json: rates with their intervals, time to the first token as median and 95th percentile."""
    return [
        {
            **{name: load[name] for name in ("requests", "prompt_tokens", "new_tokens")},
            **{name: timed_cell(load.get(name), name, file="served.json").as_dict() for name in RATES},
            "ttft_s": _ttft(load.get("ttft_s") or []),
        }
        for load in sorted(record.get("loads") or [], key=lambda load: load["requests"])
    ]


def _ttft(seconds: Sequence[float]) -> dict[str, Any]:
    """Time to first token of all requests of a load; None without any."""
    if not seconds:
        return {"median": None, "p95": None, "n": 0}
    ordered = np.sort(np.asarray(seconds, dtype=np.float64))
    place = int(np.ceil(TAIL * len(ordered))) - 1  # a request that was there, not a mean of two
    return {"median": float(np.median(ordered)), "p95": float(ordered[place]), "n": len(ordered)}


def at_most(loads: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The load with the most requests; None where none was timed."""
    return max(loads, key=lambda load: load["requests"], default=None)


def ranks(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Place of each arm by tokens of answers a second at the most requests that all of them were timed at.

    An arm is behind another where its interval is wholly below the other's; so two may share a place.

    Args:
        arms: Slug -> its part of the section, of arms that may be ranked.
    """
    common = set[int]()
    for place, arm in enumerate(arms.values()):
        timed = {load["requests"] for load in arm["loads"] if load[OUTPUT]["ci95"]}
        common = timed if place == 0 else common & timed
    if not common:
        return {}
    cells = {
        slug: next(load[OUTPUT] for load in arm["loads"] if load["requests"] == max(common))
        for slug, arm in arms.items()
    }
    return {
        slug: 1 + sum(other["ci95"][0] > cell["ci95"][1] for other in cells.values()) for slug, cell in cells.items()
    }
