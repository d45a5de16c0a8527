"""How far a job is, counted in batches or requests."""

from __future__ import annotations

from tasks.runtime.process.events import Events


class Progress:
    """Says after each one how many are done.

    Args:
        events: Of the job.
        total: How many there will be.
        unit: What is counted.
    """

    def __init__(self, events: Events, total: int, *, unit: str) -> None:
        self._events, self._total, self._unit, self._done = events, total, unit, 0

    def step(self, note: str) -> None:
        """One more is done."""
        self._done += 1
        self._events.progress(self._done, self._total, unit=self._unit, note=note)
