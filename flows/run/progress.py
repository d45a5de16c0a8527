"""Progress in a terminal: a bar of the whole run and one per live step; elsewhere plain lines, few of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.report.console import TextConsole
from flows.run.remaining import Remaining

PLAIN_EVERY_S = 60.0
WHOLE = "the whole run"


class Display:
    """What `quench run` shows while it works."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or TextConsole(stderr=True)  # stdout is for what was asked for
        self._bars = Progress(
            TextColumn("  {task.description:<36}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._ids: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()
        self._remaining: Remaining | None = None

    def expect(self, keys: Sequence[str], earlier: Mapping[str, float]) -> None:
        """Show a bar of the whole run, with how long it will still take where earlier steps tell it.

        Args:
            keys: Steps to make.
            earlier: Seconds that they took before, by key.
        """
        if keys:
            self._remaining = Remaining(keys, earlier)
            self._ids[WHOLE] = self._bars.add_task(WHOLE, total=len(keys), note="")
            self._tell_whole()

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def line(self, text: str, *, style: str | None = None) -> None:
        """A line above the bars."""
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def started(self, key: str) -> None:
        """A step began."""
        with self._lock:
            self._ids[key] = self._bars.add_task(key, total=None, note="")
            self._last[key] = time.monotonic()
            self._tell_whole()

    def event(self, key: str, event: dict[str, Any]) -> None:
        """Move the bar of a live step; without a terminal, print a line now and then."""
        if event["kind"] != "progress" or key not in self._ids:
            return
        note = event["note"] or event["unit"]
        self._bars.update(self._ids[key], completed=event["done"], total=event["total"], note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last[key] > PLAIN_EVERY_S:
            self._last[key] = now
            self.line(f"  ...   {key:<36} {event['done']}/{event['total']} {note}")

    def ended(self, key: str, text: str, *, style: str | None = None, seconds: float | None = None) -> None:
        """A step ended: its line stays. `seconds` are those that making it took."""
        with self._lock:
            if self._remaining:
                self._remaining.ended(key, seconds)
            if key in self._ids:
                self._bars.remove_task(self._ids.pop(key))
            self._tell_whole()
        self.line(text, style=style)

    def _tell_whole(self) -> None:
        if self._remaining is None:
            return
        left, running = self._remaining.steps, len(self._ids) - 1
        words = [f"{running} running", f"{left - running} waiting"]
        if (seconds := self._remaining.seconds()) is not None:
            words.append("less than a minute left" if seconds < 60 else f"about {seconds / 60:.0f} min left")
        whole = self._ids[WHOLE]
        self._bars.update(whole, completed=self._remaining.total - left, note=", ".join(words))
