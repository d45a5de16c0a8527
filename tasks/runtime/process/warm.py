"""A warm parent: a process that has imported what jobs import, and forks one child for each job.

A job's imports (torch, transformers) take 5 to 10 s of CPU time, as long as many a job. `python -m
tasks.runtime.process.child warm MODULE ...` imports them once (forks.py). Here is the launcher's side. Both speak in
lines of JSON: {"id", "job", "cwd", "log"} asks for a child; {"id", "pid"} answers when it is forked, {"id", "code"}
when it has ended (negative: a signal).

It dies with the launcher, and its children die with it. Libraries read environment variables when they are imported,
so a job that needs others than the parent's is spawned.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tasks.runtime.process.forks import NO_THREADS
from tasks.runtime.process.job import ENTRY

DEATH_S = 5.0  # the kernel kills the children of a parent that died; this is ample


class WarmParent:
    """The process, its requests and its answers. One thread uses it.

    Attributes:
        env: Its environment variables, and those of its children.
    """

    def __init__(self, modules: Sequence[str], *, env: Mapping[str, str], python: Path, log: Path) -> None:
        self.env = dict(env)
        self._ids = 0
        self._unread = b""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(python), *ENTRY, "warm", *modules],
                env={**env, **NO_THREADS, "QUENCH_PARENT": str(os.getpid())},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._process.stdin and self._process.stdout
        self._asked, self._said = self._process.stdin, self._process.stdout.fileno()
        os.set_blocking(self._said, False)

    def ask(self, job: Path, *, cwd: Path, log: Path) -> int:
        """Ask for a child; returns the id that the answers carry. Where the parent is dead, `answers` says so."""
        self._ids += 1
        line = json.dumps({"id": self._ids, "job": str(job), "cwd": str(cwd), "log": str(log)}) + "\n"
        with contextlib.suppress(BrokenPipeError):
            self._asked.write(line.encode())
            self._asked.flush()
        return self._ids

    def answers(self) -> tuple[list[dict[str, int]], bool]:
        """What it has said since the last call, without waiting; and whether it is still there."""
        try:
            chunk = os.read(self._said, 1 << 16)
        except BlockingIOError:
            return [], True
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines], chunk != b""

    def end(self) -> None:
        """Kill it, where it still lives; the kernel kills its children."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError, AttributeError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]


def wait_dead(pids: Sequence[int]) -> None:
    """Return when killed processes have ended that are not this process's own to wait for."""
    deadline = time.monotonic() + DEATH_S
    while not all(map(_is_dead, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
