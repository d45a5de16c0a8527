"""The command in this process, and what it must never do: raise, hang, take all memory, refuse without words."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flows.cli import main
from tasks.runtime.process.launch import CHECKOUT

SECONDS = 10  # of CPU time, a case at most: what a case takes by the clock depends on what else the machine does
HANGS_S = 60  # by the clock, of one that waits for something
GROWTH_MIB = 512  # of the process's peak by one case: no file of a case is larger than a few MiB
ADDRESS_SPACE = 6 << 30  # bytes: what asks for more ends in MemoryError, not in the machine's memory
CODES = (0, 2)


class TooSlow(BaseException):
    """A case took longer than it may; no `except Exception` catches it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one case.

    Attributes:
        code: Exit code; None where it raised.
        seconds: Of CPU time, without children.
        asked: It asked transformers in a child process.
        fault: What is wrong, the same for two cases with the same cause; empty for a good one.
        detail: Traceback or output of a fault.
        problems: Of a refusal, `what` of each.
    """

    code: int | None
    seconds: float
    asked: bool = False
    fault: str = ""
    detail: str = ""
    problems: tuple[str, ...] = ()


def limit_memory() -> None:
    """Bound what this process can ask for."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def through(argv: Sequence[str], then: Callable[[], None] | None = None) -> Outcome:
    """Call `quench ARGV` as the command does, and look at everything that it answers.

    Args:
        argv: Words behind `quench`.
        then: Called after exit code 0, within the same limits: what a later command reads of the same input.
    """
    # stdout is strict and stderr is not, as in a real process
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    before, before_s, began, code = peak_mib(), _children_s(), time.process_time(), None
    fault = detail = ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _within_limits():
            code = main(argv)
            if code == 0 and then:
                then()
    except TooSlow:
        fault, detail = f"too slow in {_place(sys.exc_info()[2])}", traceback.format_exc()
    except (Exception, SystemExit) as error:  # what a user would see as a traceback: here it is the finding
        fault, detail = f"{type(error).__name__} in {_place(error.__traceback__)}", traceback.format_exc()
    seconds, grown = time.process_time() - began, peak_mib() - before
    said, remarks = (stream.buffer.getvalue().decode() for stream in (out, err))  # pyright: ignore[reportAttributeAccessIssue]
    if not fault and code not in CODES:
        fault, detail = f"exit code {code}", remarks
    if not fault and grown > GROWTH_MIB:
        fault, detail = f"peak memory {grown:.0f} MiB more", remarks
    problems: tuple[str, ...] = ()
    if not fault:
        problems, fault = _answer(code or 0, said, remarks, as_json="--json" in argv)
        detail = said + remarks if fault else ""
    asked = _children_s() > before_s
    return Outcome(code=code, seconds=seconds, asked=asked, fault=fault, detail=detail, problems=problems)


def by_process(argv: Sequence[str], *, env: dict[str, str]) -> str:
    """The same as a process of its own; what is wrong with it, in words, or nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *argv], cwd=CHECKOUT, env=env, capture_output=True, timeout=120, check=False
    )
    if done.returncode not in CODES or b"Traceback" in done.stderr:
        return f"a process ends with {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}"
    return ""


def _answer(code: int, said: str, remarks: str, *, as_json: bool) -> tuple[tuple[str, ...], str]:
    """What a refusal says, and what is wrong with the answer."""
    if not as_json:
        refused = [line for line in remarks.splitlines() if line.startswith("error: ")]
        if (code == 2) != bool(refused):
            return (), f"exit code {code} with {len(refused)} errors"
        return tuple(line.removeprefix("error: ") for line in refused), ""
    answer = json.loads(said)
    if answer["ok"] != (code == 0) or answer["ok"] == bool(answer["problems"]):
        return (), f"exit code {code} with {len(answer['problems'])} problems"
    for problem in (*answer["problems"], *answer.get("warnings", ())):
        if "input should" in problem["what"].lower():
            return (), f"a problem in pydantic's words: {problem['what'][-60:]}"
        for part in ("what", "where", "why", "next"):
            if not problem[part].strip(" ."):
                return (), f"a problem without `{part}`: {problem['what'][:60]}"
            if control := next((char for char in problem[part] if not char.isprintable() and char != "\n"), ""):
                return (), f"a problem prints {control!a} in `{part}`: {problem['what'][:20]!a}"
    return tuple(problem["what"] for problem in answer["problems"]), ""


def _children_s() -> float:
    """CPU time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _within_limits() -> Iterator[None]:
    """Raise TooSlow where a case works or waits for too long."""

    def stop(number: int, frame: object) -> None:
        raise TooSlow

    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _place(trace: object) -> str:
    """The innermost frame of ours: what two cases with one cause have in common."""
    frames = traceback.extract_tb(trace)  # pyright: ignore[reportArgumentType]
    ours = [
        frame
        for frame in frames
        if frame.filename.startswith(str(CHECKOUT))
        and "/.venv/" not in frame.filename
        and "/tests/" not in frame.filename
    ]
    last = (ours or list(frames))[-1]
    return f"{last.filename.removeprefix(str(CHECKOUT) + '/')}:{last.lineno} {last.name}"
