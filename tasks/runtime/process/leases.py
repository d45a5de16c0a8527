"""Leases: CPU slots and GPUs, each for one heavy step, across flows and processes, by file lock.

A child's thread count is its lease. Everyone passes one gate to take slots, so a step that wants the whole
machine is not starved by small ones; a step that waits says what it waits for. A dead owner's lease is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tasks.runtime.gpus import visible_gpus
from tasks.runtime.store.local import flocked


def this_machine() -> str:
    """One name in all containers of a machine, another on every other machine: the kernel's, since it started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What a child may use: CPU slots (= threads) and GPU indices."""

    cpus: tuple[int, ...]
    gpus: tuple[int | str, ...]


def cpu_slots() -> int:
    """CPU slots of this machine: QUENCH_CPU_SLOTS, else the cores this process may run on."""
    slots = os.environ.get("QUENCH_CPU_SLOTS")
    return max(1, int(slots)) if slots else len(os.sched_getaffinity(0))


class GrantedLease:
    """What somebody else, Ray, has leased to this process already: nothing is waited for, nothing is locked."""

    def __init__(self, *, cpus: int, gpus: Sequence[int | str]) -> None:
        self.lease = Lease(cpus=tuple(range(cpus)), gpus=tuple(gpus))

    @contextlib.contextmanager
    def take(
        self,
        cpus: int,
        gpus: int = 0,
        *,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Generator[Lease]:
        """All of it, for the one step of this process; see Leases.take."""
        yield self.lease


class Leases:
    """Lock files of one machine in one home: machines that share a home have slots and GPUs of their own."""

    def __init__(self, home: Path, *, machine: str | None = None) -> None:
        self.folder = home / "leases" / (machine or this_machine())
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def take(
        self,
        cpus: int,
        gpus: int = 0,
        *,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Generator[Lease]:
        """Hold `cpus` slots (0: the whole machine) and `gpus` GPUs while the body runs.

        Raises:
            InterruptedError: `stop` was set while waiting.
        """
        slots = tuple(range(cpu_slots()))
        count = len(slots) if cpus == 0 else min(cpus, len(slots))
        with contextlib.ExitStack() as held:
            first = functools.partial(say, f"waiting behind another step, for {count} cpu and {gpus} gpu")
            with flocked(self.folder / "gate.lock", stop=stop, waits=first):
                leased_cpus = self._lock("cpu", slots, count, held=held, stop=stop, say=say)
                visible = visible_gpus() if gpus else ()
                leased_gpus = self._lock("gpu", visible, gpus, held=held, stop=stop, say=say)
            yield Lease(cpus=leased_cpus, gpus=leased_gpus)

    def _lock(
        self,
        kind: str,
        numbers: tuple[int, ...],
        count: int,
        *,
        held: contextlib.ExitStack,
        stop: threading.Event | None,
        say: Callable[[str], None],
    ) -> tuple[int, ...]:
        """Lock `count` of these slots, waiting until so many are free."""
        leased: list[int] = []
        reported = False
        while len(leased) < count:
            for number in numbers:
                if number not in leased and len(leased) < count and (file := self._try(f"{kind}-{number}")):
                    held.enter_context(file)
                    leased.append(number)
            if len(leased) < count:
                if not reported:
                    say(f"waiting for {count - len(leased)} more {kind} of {len(numbers)}")
                    reported = True
                if stop is not None and stop.is_set():
                    raise InterruptedError(f"stopped while waiting for a {kind}")
                time.sleep(0.05)
        return tuple(sorted(leased))

    def _try(self, name: str) -> IO[str] | None:
        file = (self.folder / f"{name}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file
