"""Who listens where: the addresses of a process, of all that it started, and of what they left in their groups."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from pathlib import Path

import psutil

from tests.flows.test_resume import processes_of

LOOPBACK = {"127.0.0.1", "::1"}


class Listening:
    """While it is entered, looks every 0.1 s at the processes of a home and notes where they listen."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.seen: dict[str, set[str]] = defaultdict(set)  # address -> command lines
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Listening:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.look()

    def look(self) -> None:
        """Note where they listen now."""
        for pid, program in processes_of(self.home).items():
            with contextlib.suppress(psutil.Error):
                for one in psutil.Process(pid).net_connections(kind="inet"):
                    if one.status == psutil.CONN_LISTEN:
                        self.seen[one.laddr.ip].add(program[:120])

    @property
    def elsewhere(self) -> dict[str, set[str]]:
        """Addresses that are not loopback, with who listens there."""
        return {address: who for address, who in self.seen.items() if address not in LOOPBACK}
