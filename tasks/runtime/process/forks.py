"""The warm parent's own side: import once, fork a child for each job (warm.py starts it, and says what is spoken).

A forked child is as alone as a spawned one: its own session, memory and log, and it dies with its parent. The parent
never runs a job. It has no secrets, no other thread and no CUDA, or it refuses to start.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Of the parent alone: pyarrow's allocator starts a thread of its own otherwise, which a fork would lose.
NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}


def serve(modules: Sequence[str], run: Callable[[Path], int]) -> int:
    """The process's own side: import, then fork a child for each line of standard input, until it is closed.

    Args:
        modules: Are imported before the first fork.
        run: Is called in the forked child with job.json's path, and returns its exit code. QUENCH_PARENT names this
            process, as in a child that was spawned.

    Returns:
        Exit code: 1 where this process cannot be forked from, since it has threads or CUDA.
    """
    # The protocol goes over copies; what an import prints goes to the log.
    asked, said = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    for module in modules:
        importlib.import_module(module)
    if reason := not_to_be_forked():
        print(f"no warm parent: {reason}", file=sys.stderr)
        return 1
    gc.collect()
    gc.freeze()  # what is there stays shared: a collection in a child would touch each of its pages
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    children: dict[int, int] = {}
    unread = b""
    while True:
        ready, _, _ = select.select([asked, ended], [], [])
        if ended in ready:
            os.read(ended, 1 << 12)
        _report_ended(children, said)
        if asked not in ready:
            continue
        chunk = os.read(asked, 1 << 16)
        if not chunk:
            return 0
        *lines, unread = (unread + chunk).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = _fork(request, run, close=(asked, said, ended, wake))
            children[pid] = request["id"]
            _say(said, id=request["id"], pid=pid)


def not_to_be_forked() -> str | None:
    """Why a fork of this process would not be a whole one: it has another thread, or CUDA's library."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"the imports started {threads - 1} thread(s), which a fork loses"
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return "the imports loaded CUDA, which does not survive a fork" if "libcuda.so" in maps else None


def _fork(request: Mapping[str, Any], run: Callable[[Path], int], *, close: Sequence[int]) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ["QUENCH_PARENT"] = str(parent)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in close:
            os.close(descriptor)
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.close(log)
        os.close(null)
        os.chdir(request["cwd"])
        for name in NO_THREADS:
            del os.environ[name]
        if numpy := sys.modules.get("numpy"):  # Python's own generator is seeded anew by a fork, numpy's is not
            numpy.random.seed()
        code = run(Path(request["job"]))
    except BaseException:  # the top of a process: nothing may return into the parent's loop
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _report_ended(children: dict[int, int], said: int) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        _say(said, id=children.pop(pid), code=os.waitstatus_to_exitcode(status))


def _say(said: int, **answer: int) -> None:
    os.write(said, json.dumps(answer).encode() + b"\n")
