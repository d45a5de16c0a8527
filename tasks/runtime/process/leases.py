"""Leases: CPU slots and GPUs, each for one heavy step, across flows and processes, by file lock.

A child's thread count is its lease. Everyone passes one gate to take slots, so a step that wants the whole
machine is not starved by small ones; a step that waits says what it waits for. A dead owner's lease is free. Of the
steps of one run, the most urgent one stands at the gate.
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

from recipes.problem import Problem
from tasks.runtime.gpus import Visible, no_gpu, visible_gpus
from tasks.runtime.process.turns import Turns
from tasks.runtime.store.local import flocked


def this_machine() -> str:
    """One name in all containers of a machine, another on every other machine: the kernel's, since it started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What a child may use: CPU slots (= threads) and GPUs, as CUDA_VISIBLE_DEVICES names them."""

    cpus: tuple[int, ...]
    gpus: tuple[int | str, ...]


class NoSuchLeaseError(RuntimeError):
    """More GPUs are wanted than there are: no waiting would help."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


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
        urgency: float = 0.0,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Generator[Lease]:
        """All of it, for the one step of this process; see Leases.take."""
        yield self.lease


class Leases:
    """Lock files of one machine in one home: machines that share a home have slots and GPUs of their own."""

    def __init__(
        self,
        home: Path,
        *,
        machine: str | None = None,
        gpus: Callable[[], Sequence[Visible]] = visible_gpus,
    ) -> None:
        self._gpus = gpus
        self._turns = Turns()
        self.folder = home / "leases" / (machine or this_machine())
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def take(
        self,
        cpus: int,
        gpus: int = 0,
        *,
        urgency: float = 0.0,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Generator[Lease]:
        """Hold `cpus` slots (0: the whole machine) and `gpus` GPUs while the body runs.

        Args:
            cpus: Slots.
            gpus: GPUs.
            urgency: Of those who wait in this process the most urgent one is served first.
            stop: Ends the waiting.
            say: Is told what is waited for.

        Raises:
            InterruptedError: `stop` was set while waiting.
            NoSuchLeaseError: So many GPUs are not visible.
        """
        by_uuid = _enough(gpus, self._gpus) if gpus else {}
        slots = tuple(map(str, range(cpu_slots())))
        count = len(slots) if cpus == 0 else min(cpus, len(slots))
        with contextlib.ExitStack() as held:
            first = functools.cache(lambda: say(f"waiting behind another step, for {count} cpu and {gpus} gpu"))
            turn = self._turns.turn(urgency, stop=stop, waits=first)
            with turn, flocked(self.folder / "gate.lock", stop=stop, waits=first):
                leased_cpus = self._lock("cpu", slots, count, held=held, stop=stop, say=say)
                leased_gpus = self._lock("gpu", tuple(by_uuid), gpus, held=held, stop=stop, say=say)
            devices = tuple(by_uuid[uuid].device for uuid in leased_gpus)
            yield Lease(cpus=tuple(map(int, leased_cpus)), gpus=devices)

    def _lock(
        self,
        kind: str,
        names: tuple[str, ...],
        count: int,
        *,
        held: contextlib.ExitStack,
        stop: threading.Event | None,
        say: Callable[[str], None],
    ) -> tuple[str, ...]:
        """Lock `count` of these slots, waiting until so many are free; returned in the order of `names`."""
        leased: list[str] = []
        reported = False
        while len(leased) < count:
            for name in names:
                if name not in leased and len(leased) < count and (file := self._try(f"{kind}-{name}")):
                    held.enter_context(file)
                    leased.append(name)
            if len(leased) < count:
                if not reported:
                    say(f"waiting for {count - len(leased)} more {kind} of {len(names)}")
                    reported = True
                if stop is not None and stop.is_set():
                    raise InterruptedError(f"stopped while waiting for a {kind}")
                time.sleep(0.05)
        return tuple(sorted(leased, key=names.index))

    def _try(self, name: str) -> IO[str] | None:
        file = (self.folder / f"{name}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file


def _enough(count: int, look: Callable[[], Sequence[Visible]]) -> dict[str, Visible]:
    """The visible GPUs by UUID: containers of one machine count them differently, and share these locks.

    Raises:
        NoSuchLeaseError: There are fewer than `count`, or several are wanted of a GPU that is split.
    """
    by_uuid = {shown.gpu.uuid: shown for shown in look()}
    if not by_uuid and (problem := no_gpu("run.device: cuda")):
        raise NoSuchLeaseError(problem)
    if len(by_uuid) < count:
        raise NoSuchLeaseError(
            Problem(
                what=f"{count} GPUs are wanted at once; {len(by_uuid)} are visible.",
                where="run.processes",
                why="Each process of a training has a GPU of its own.",
                next=f"Set run.processes to {max(1, len(by_uuid))}, or make more visible (CUDA_VISIBLE_DEVICES).",
            )
        )
    if count > 1 and any(shown.gpu.mig for shown in by_uuid.values()):
        raise NoSuchLeaseError(
            Problem(
                what=f"{count} GPUs are wanted at once, and there are MIG instances among the visible ones.",
                where="run.processes",
                why="CUDA shows a process one MIG instance at most.",
                next="Set run.processes: 1, or name whole GPUs in CUDA_VISIBLE_DEVICES.",
            )
        )
    return by_uuid
