"""How long a run will still take, by how long its steps took before."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean


class Remaining:
    """What is left to make.

    A step will take as long as when an earlier run of this home made it; else as long as steps of its stage took in
    this run; else nobody knows, and nothing is said. What was made at the same time so far will be so further on.

    Attributes:
        total: Steps to make, at the start.
    """

    def __init__(self, keys: Sequence[str], earlier: Mapping[str, float]) -> None:
        """Steps to make, and seconds of earlier ones."""
        self._left = set(keys)
        self.total = len(self._left)
        self._earlier = earlier
        self._stages: dict[str, list[float]] = defaultdict(list)
        self._began = time.monotonic()

    def ended(self, key: str, seconds: float | None) -> None:
        """A step was made, or failed and has no seconds."""
        if key in self._left:
            self._left.remove(key)
            if seconds is not None:
                self._stages[_stage(key)].append(seconds)

    @property
    def steps(self) -> int:
        """How many are not made yet."""
        return len(self._left)

    def seconds(self) -> float | None:
        """Expected until the last one is made; None where that cannot be known yet."""
        expected = [self._expected(key) for key in self._left]
        known = [seconds for seconds in expected if seconds is not None]
        if len(known) < len(expected):
            return None
        worked = sum(map(sum, self._stages.values()))
        at_once = max(1.0, worked / max(time.monotonic() - self._began, 1e-3)) if worked else 1.0
        return sum(known) / at_once

    def _expected(self, key: str) -> float | None:
        if key in self._earlier:
            return self._earlier[key]
        alike = self._stages.get(_stage(key))
        return mean(alike) if alike else None


def _stage(key: str) -> str:
    return key.partition("/")[0]
