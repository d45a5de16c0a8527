"""Work that a stranger wrote ends once it has taken more than it may, and leaves the process as it was."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable

import pytest

from tasks.runtime.bounds import OverBounds, bounds


def endless() -> None:
    while True:
        pass


def swallowing() -> None:
    while True:
        try:
            endless()
        except Exception:  # code of a stranger may do that
            continue


TIME: dict[str, Callable[[], object]] = {
    "a loop": endless,
    "a loop that catches everything": swallowing,
    "a regular expression": lambda: re.search("(a+)+b", "a" * 60),
    "a large integer": lambda: pow(10, 10**9),
}
MEMORY: dict[str, Callable[[], object]] = {
    "one string": lambda: "a" * (1 << 32),
    "a list that grows": lambda: [bytes(1 << 20) for _ in range(1 << 12)],
    "a format": lambda: f"{1:{10**10}d}",
}


@pytest.mark.parametrize("work", TIME.values(), ids=TIME)
def test_time_is_bounded(work: Callable[[], object]) -> None:
    began = time.process_time()
    with pytest.raises(OverBounds, match=r"more than 0\.3 s of processor time"), bounds(seconds=0.3, mib=1024):
        work()
    assert time.process_time() - began < 3  # a signal is handled at the next instruction


@pytest.mark.parametrize("work", MEMORY.values(), ids=MEMORY)
def test_memory_is_bounded(work: Callable[[], object]) -> None:
    with pytest.raises(OverBounds, match="more than 256 MiB of memory"), bounds(seconds=20, mib=256):
        work()


def test_nothing_stays_behind() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bounds(seconds=5, mib=64):
        assert resource.getrlimit(resource.RLIMIT_AS)[0] != before[0]
    with pytest.raises(KeyError), bounds(seconds=5, mib=64):
        raise KeyError("of the work itself")
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert len("a" * (1 << 28)) == 1 << 28


def test_a_forked_process_counts_its_own_memory() -> None:
    with bounds(seconds=5, mib=64):
        pass
    ballast = bytearray(1 << 28)  # the child frees it: with the parent's count it would have that much more
    if (child := os.fork()) == 0:
        ballast.clear()
        try:
            with bounds(seconds=5, mib=64):
                bytearray(1 << 27)
        except OverBounds:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
