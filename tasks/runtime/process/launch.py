"""Child processes: one launcher thread spawns and waits on all of them, and ends them on every exit path.

PR_SET_PDEATHSIG is tied to the thread that called fork, so children must be spawned by a thread that lives as
long as the process. Jobs start as `python -P -m tasks.runtime.process.child run job.json`, programs that are not ours
(a Prefect server) as `... child exec -- program args`.

A launcher that is given modules starts jobs warm where it may: it forks them from a process that has imported these
modules (warm.py; adr/0020). QUENCH_COLD=1 spawns every job.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from recipes.secrets import is_secret
from tasks.runtime.process.job import ENTRY
from tasks.runtime.process.warm import WarmParent, wait_dead

CHECKOUT = Path(__file__).resolve().parents[3]
GRACE_S = 3.0
POLL_S = 0.02


@dataclass(eq=False, kw_only=True)
class Child:
    """A live or ended child, leader of its own session and process group.

    Attributes:
        pid: Process id, and process group id.
        lost: It was killed because the process that it was forked from died: nothing speaks against another try.
    """

    pid: int
    ended: Future[int] = field(default_factory=Future)
    lost: bool = False

    def wait(self, timeout: float | None = None) -> int:
        """Exit code (negative: a signal). Raises TimeoutError."""
        return self.ended.result(timeout)

    def signal(self, number: int) -> None:
        """Send a signal to the whole group, also where only grandchildren of it are left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@dataclass(frozen=True, kw_only=True)
class _Request:
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    python: Path
    warm: bool
    answer: Future[Child] = field(default_factory=Future)


@dataclass(eq=False, kw_only=True)
class _Forks:
    """A warm parent, what it was asked for, and its children by the ids of the requests."""

    parent: WarmParent
    works: bool = False
    asked: dict[int, _Request] = field(default_factory=dict)
    children: dict[int, Child] = field(default_factory=dict)


class Launcher:
    """The set of live children. Use as a context manager in the flow's body: leaving it ends them all.

    Args:
        warm: Modules that a warm parent imports before it forks jobs; none: every job is spawned.
    """

    def __init__(self, *, warm: Sequence[str] = ()) -> None:
        self.stop = threading.Event()
        forks = sys.platform == "linux" and os.environ.get("QUENCH_COLD") != "1"  # elsewhere forks are not whole
        self._modules = tuple(warm) if forks else ()
        self._requests: queue.Queue[_Request] = queue.Queue()
        self._live: set[Child] = set()
        self._spawned: dict[Child, subprocess.Popen[bytes]] = {}
        self._forks: _Forks | None = None
        self._thread = threading.Thread(target=self._loop, name="quench-launcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.end_all()

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        python: Path | None = None,
        warm: bool = False,
    ) -> Child:
        """Start a child in the launcher's thread; stdout and stderr go to `log`.

        Args:
            argv: Arguments of tasks.runtime.process.child.
            env: Its environment variables.
            cwd: Its current folder.
            log: Is appended to.
            python: Interpreter; default: this process's own.
            warm: It may be forked from a warm parent: `run JOB.json` in this interpreter, one thread, no GPU. It is
                where its environment variables are those of the first one.

        Raises:
            InterruptedError: The launcher has been ended.
        """
        if self.stop.is_set():
            raise InterruptedError("the launcher has ended")
        request = _Request(argv=argv, env=env, cwd=cwd, log=log, python=python or Path(sys.executable), warm=warm)
        self._requests.put(request)
        return request.answer.result()

    def end(self, child: Child) -> None:
        """SIGTERM to the child's group, SIGKILL after the grace period; returns when it is gone."""
        child.signal(signal.SIGTERM)
        try:
            child.wait(GRACE_S)
        except TimeoutError:
            child.signal(signal.SIGKILL)
            child.wait()
        child.signal(signal.SIGKILL)  # what the leader left behind in its group

    def end_all(self) -> None:
        """End every child; no new one can start. Safe to call twice."""
        self.stop.set()
        live = list(self._live)
        for child in live:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        for child in live:
            with contextlib.suppress(TimeoutError):
                child.wait(max(0.0, deadline - time.monotonic()))
        for child in live:
            child.signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                child.wait(GRACE_S)

    def _loop(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._take(self._requests.get(timeout=POLL_S))
            for child, process in list(self._spawned.items()):
                code = process.poll()
                if code is not None:
                    del self._spawned[child]
                    self._ended(child, code)
            if self._forks is not None:
                self._hear(self._forks)

    def _take(self, request: _Request) -> None:
        if self.stop.is_set():
            request.answer.set_exception(InterruptedError("the launcher has ended"))
            return
        try:
            if (forks := self._warm(request)) is None:
                self._spawn(request)
            else:
                request.log.open("ab").close()  # one that cannot be written is told here, as of a spawned child
                job = Path(request.argv[1])
                forks.asked[forks.parent.ask(job, cwd=request.cwd, log=request.log)] = request
        except OSError as error:
            request.answer.set_exception(error)

    def _warm(self, request: _Request) -> _Forks | None:
        """The warm parent, started where there is none; None where it cannot be this child's: then it is spawned."""
        if not (request.warm and self._modules):
            return None
        if self._forks is None:
            parent = WarmParent(self._modules, env=request.env, python=request.python, log=request.log)
            self._forks = _Forks(parent=parent)
        return self._forks if self._forks.parent.env == dict(request.env) else None

    def _hear(self, forks: _Forks) -> None:
        """What a warm parent says: this one is forked, that one has ended, or nothing any more."""
        answers, alive = forks.parent.answers()
        for answer in answers:
            if "pid" in answer:
                forks.works, request = True, forks.asked.pop(answer["id"])
                child = forks.children[answer["id"]] = Child(pid=answer["pid"])
                self._live.add(child)
                request.answer.set_result(child)
            else:
                self._ended(forks.children.pop(answer["id"]), answer["code"])
        if not alive or (self.stop.is_set() and not forks.children):
            self._forget(forks)

    def _forget(self, forks: _Forks) -> None:
        """End a warm parent. Its children are gone with it; what it was asked for is spawned."""
        self._forks = None
        forks.parent.end()
        if not forks.works:  # the log of the first job says why; another one would end likewise
            self._modules = ()
        wait_dead([child.pid for child in forks.children.values()])
        for child in forks.children.values():
            child.lost = True
            self._ended(child, -signal.SIGKILL)
        for request in forks.asked.values():
            self._take(replace(request, warm=False))

    def _ended(self, child: Child, code: int) -> None:
        self._live.discard(child)
        child.ended.set_result(code)

    def _spawn(self, request: _Request) -> None:
        with request.log.open("ab") as log:
            process = subprocess.Popen(
                [str(request.python), *ENTRY, *request.argv],
                env={**request.env, "QUENCH_PARENT": str(os.getpid())},
                cwd=request.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child = Child(pid=process.pid)
        self._spawned[child] = process
        self._live.add(child)
        request.answer.set_result(child)


def child_env(
    *, threads: int = 1, gpus: Sequence[int | str] | None = None, keep: tuple[str, ...] = ()
) -> dict[str, str]:
    """Environment of a child: the checkout alone on PYTHONPATH, its threads, its GPUs, no network, no secrets.

    Secrets stay with the parent: a job works on local files and asks nobody.

    Args:
        threads: Threads that it may use.
        gpus: GPUs that it may see, by index or by NVIDIA's own name; None leaves them as they are.
        keep: Beginnings of the names of secret variables that it needs: what a server reads its own settings from.
    """
    env = {name: text for name, text in os.environ.items() if name.startswith(keep) or not is_secret(name, text)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling transformers anew costs every child 5 s
    env |= {
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "true",  # MLflow takes no other word for it
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GPTQMODEL_CPU_WORKERS": "2",  # with fewer, GPTQModel 7.6 on two cores ends in "parent 'cpu' only has 1"
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # not 1,024: training takes 0.2 GiB less, as fast, same bytes
        "THP_MEM_ALLOC_ENABLE": "1",  # AWQ's search on CPU: 17 s to 4.5 s of system time, same bytes
    }
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        env[name] = str(threads)
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpus)
        env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # NVML's, by which they are counted; CUDA's is fastest first
    return env
