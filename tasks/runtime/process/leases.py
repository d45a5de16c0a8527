"""Leases: CPU slots and GPUs, one heavy step each, across flows and processes, by file lock.

A child's thread count is its lease. Everyone passes one gate to take slots, so a step that wants the whole
machine is not starved by small ones; whoever waits says for what. A dead owner's lease is free.
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
    named = os.environ.get("QUENCH_CPU_SLOTS")
    return max(1, int(named)) if named else len(os.sched_getaffinity(0))


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
        every = range(cpu_slots())
        want_cpus = len(every) if cpus == 0 else min(cpus, len(every))
        with contextlib.ExitStack() as held:
            first = functools.partial(say, f"waiting behind another step, for {want_cpus} cpu and {gpus} gpu")
            with flocked(self.folder / "gate.lock", stop=stop, waits=first):
                got_cpus = self._some("cpu", tuple(every), want_cpus, held=held, stop=stop, say=say)
                got_gpus = self._some("gpu", visible_gpus() if gpus else (), gpus, held=held, stop=stop, say=say)
            yield Lease(cpus=got_cpus, gpus=got_gpus)

    def _some(
        self,
        kind: str,
        names: tuple[int, ...],
        want: int,
        *,
        held: contextlib.ExitStack,
        stop: threading.Event | None,
        say: Callable[[str], None],
    ) -> tuple[int, ...]:
        got: list[int] = []
        said = False
        while len(got) < want:
            for name in names:
                if name not in got and len(got) < want and (file := self._try(f"{kind}-{name}")):
                    held.enter_context(file)
                    got.append(name)
            if len(got) < want:
                if not said:
                    say(f"waiting for {want - len(got)} more {kind} of {len(names)}")
                    said = True
                if stop is not None and stop.is_set():
                    raise InterruptedError(f"stopped while waiting for a {kind}")
                time.sleep(0.05)
        return tuple(sorted(got))

    def _try(self, name: str) -> IO[str] | None:
        file = (self.folder / f"{name}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file
