"""Processor time and memory of a piece of work that a stranger wrote: a chat template, a query, a regular expression.

Python that runs in this process cannot be ended by a thread. A timer of the process can: its signal is handled between
two instructions of Python, within regular expressions and within arithmetic of large integers. What one call into C
allocates is bounded by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Generator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Final

MIB: Final = 1 << 20
STATM: Final = Path("/proc/self/statm")  # Linux alone has it; elsewhere memory is not bounded


class OverBounds(Exception):
    """Work took more than it may; the text says more of what."""


@contextlib.contextmanager
def bounds(*, seconds: float, mib: int) -> Generator[None]:
    """End what runs inside once it has taken more than this; some 10 us of its own.

    For the main thread of a process, which is where signals go; not for bounds within bounds.

    Args:
        seconds: Processor time of the process, of all its threads: a busy machine ends nothing earlier.
        mib: Address space in MiB beyond what the process has now.

    Raises:
        OverBounds: It took more.
    """
    _install()
    address_space = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if sys.platform == "linux":
            _lower(address_space, _address_space(os.getpid()) + mib * MIB)
        _Timer.armed = True
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    except _TimeIsUp:
        raise OverBounds(f"more than {seconds:g} s of processor time") from None
    except MemoryError:
        raise OverBounds(f"more than {mib} MiB of memory") from None
    finally:
        _Timer.armed = False  # a signal that comes from here on ends nothing
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, address_space)


class _Timer:
    armed = False


class _TimeIsUp(BaseException):
    """Passes every `except Exception` of the work."""


@cache
def _install() -> None:
    """The handler stays: nothing else sends this signal, and to install it takes as long as all the rest."""
    signal.signal(signal.SIGPROF, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if _Timer.armed:
        raise _TimeIsUp


def _lower(now: tuple[int, int], wanted: int) -> None:
    """Lower the soft limit; one that is lower already stays."""
    soft, hard = now
    lowest = min([wanted, *(limit for limit in now if limit != resource.RLIM_INFINITY)])
    if lowest != soft:
        resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))


def _address_space(process: int) -> int:
    """Bytes of address space of this process."""
    return int(os.pread(_statm(process), 64, 0).split(maxsplit=1)[0]) * resource.getpagesize()


@cache
def _statm(process: int) -> int:
    """The open file that says it; a process that was forked opens its own."""
    return os.open(STATM, os.O_RDONLY)
