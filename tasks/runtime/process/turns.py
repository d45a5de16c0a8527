"""Turns: of the threads of one process that wait for the same thing, the most urgent goes first."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Generator

LOOK_S = 0.1


class Turns:
    """One thread at a time has its turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int]] = []
        self._taken = False

    @contextlib.contextmanager
    def turn(
        self, urgency: float, *, stop: threading.Event | None = None, waits: Callable[[], None] = lambda: None
    ) -> Generator[None]:
        """Wait until nobody has the turn and nobody more urgent waits for it; of equals, who came first.

        Args:
            urgency: The higher, the sooner.
            stop: Ends the waiting.
            waits: Is called once where somebody else goes first.

        Raises:
            InterruptedError: `stop` was set while waiting.
        """
        own, told = (-urgency, next(self._numbers)), False
        with self._changed:
            self._waiting.append(own)
            try:
                while self._taken or min(self._waiting) != own:
                    if stop is not None and stop.is_set():
                        raise InterruptedError("stopped while waiting for a turn")
                    if not told:
                        waits()
                        told = True
                    self._changed.wait(LOOK_S)
                self._taken = True
            finally:
                self._waiting.remove(own)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
