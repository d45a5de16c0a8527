"""Entry of every child process.

`run JOB.json` imports the job's body and runs it; result.json beside job.json is what the parent reads:
{"ok": true, "result", "peak_rss_gib", "peak_gpu_gib"} or {"ok": false, "problem", "type"}.
Where several processes do a job together, it becomes `accelerate launch`, which starts it once per rank.
`warm MODULE ...` imports the modules and forks a child for each job that it is asked for (forks.py).
`debug JOB.json` runs it in a terminal, with pdb where it raises: `quench debug`.
`exec -- PROGRAM ARGS` becomes a program that is not ours, `guard -- PROGRAM ARGS` starts one that has children.
All die with the parent, even when SIGKILL ends it (Linux: PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import os
import pdb
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.problem import Problem
from tasks.runtime.process.disk import full, has_space, is_full
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.forks import serve
from tasks.runtime.process.job import ENTRY, Job
from tasks.runtime.process.ports import free_port

PR_SET_PDEATHSIG = 1
# Loggers that warn at every import of torchao on a machine without the GPU that its kernels were built for.
NOISY = ("torchao", "torch.utils._pytree")
GIB = 1 << 30
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}
# The two fields of a stage that its memory depends on most.
MEMORY_FIELDS = {
    "train": ("run.micro_batch", "data.max_length"),
    "reference": ("evaluate.batch_size", "data.max_length"),
    "evaluate": ("evaluate.batch_size", "data.max_length"),
    "quantize": ("calibrate.rows", "calibrate.seq_len"),
    "measure": ("measure.batch", "measure.prompt_tokens"),
}


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when the spawning thread ends; exit at once if the parent is gone already."""
    parent = os.environ.pop("QUENCH_PARENT", None)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)


def verify_checkout() -> None:
    """Refuse to run when flows, tasks and recipes do not come from this checkout.

    Raises:
        SystemExit: A user's own module of the same name stands in for ours.
    """
    checkout = Path(__file__).resolve().parents[3]
    for name in ("tasks", "recipes"):
        origin = Path(importlib.import_module(name).__file__ or "").resolve()
        if checkout not in origin.parents:
            raise SystemExit(f"{name} comes from {origin}, not from {checkout}: rename that module or run elsewhere")


def guard(words: Sequence[str]) -> int:
    """Run a program and return its exit code; when the parent dies, kill its whole process group.

    The kernel's signal reaches only the process that asked for it, not those that an MLflow server or a Prefect worker
    starts in turn: they would outlive a parent that was killed. Whoever sends SIGTERM sends it to the whole group.
    """

    def end_group(number: int, frame: object) -> None:
        os.killpg(0, signal.SIGKILL)

    def ignore(number: int, frame: object) -> None:  # SIG_IGN would be inherited by the program
        return

    signal.signal(signal.SIGHUP, end_group)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ignore)
    die_with_parent(signal.SIGHUP)
    code = subprocess.Popen(words).wait()
    return code if code >= 0 else 128 - code  # as a shell reports a signal


def _peak_gpu_gib() -> float | None:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_allocated() / GIB


def launch_ranks(job: Job, path: Path) -> None:
    """Become `accelerate launch`, which starts this same command `execution.processes` times; does not return.

    It stays leader of the process group and keeps PR_SET_PDEATHSIG; each rank asks for its own, because torch's
    launcher gives ranks sessions of their own, where a signal to the group does not reach.
    """
    config = Path(__file__).resolve().parents[3] / "infra" / "accelerate" / f"{job.execution.launcher}.yaml"
    path.with_name("result.json").unlink(missing_ok=True)
    os.environ["QUENCH_PARENT"] = str(os.getpid())  # of the ranks: exec keeps the process id
    accelerate = [sys.executable, "-P", "-m", "tasks.jobs.training.ranks", "--config_file", str(config)]
    sizes = ["--num_processes", str(job.execution.processes), "--main_process_port", str(free_port())]
    os.execv(sys.executable, [*accelerate, *sizes, "-m", "tasks.runtime.process.child", "run", str(path)])


def run_job(path: Path) -> int:
    """Run one job; write result.json; return the exit code (0 done, 1 failed)."""
    job = Job.load(path)
    if job.execution.processes > 1 and "RANK" not in os.environ:
        launch_ranks(job, path)
    module, _, function = job.entry.partition(":")
    if job.execution.log_level != "DEBUG":
        _quiet()
    try:
        body = getattr(importlib.import_module(module), function)
        answer: dict[str, Any] = {"ok": True, "result": body(job)}
    except StageError as error:
        print(error, file=sys.stderr)
        answer = {"ok": False, "type": "StageError", "problem": error.problem.as_dict()}
    except Exception as error:  # the child's top: the parent gets every error in four parts
        traceback.print_exc()
        answer = {"ok": False, "type": type(error).__name__, "problem": _as_problem(job, error).as_dict()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # KiB on Linux
    answer |= {"peak_rss_gib": peak, "peak_gpu_gib": _peak_gpu_gib()}
    if job.rank == 0 or not answer["ok"]:
        _write_answer(answer, path.with_name("result.json"), first_wins=job.execution.processes > 1)
    return 0 if answer["ok"] else 1


def _quiet() -> None:
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _warm(modules: Sequence[str]) -> int:
    from setproctitle import setproctitle  # of the main environment alone; before anything moves its arguments

    def forked(path: Path) -> int:
        die_with_parent()
        setproctitle(" ".join([sys.executable, *ENTRY, "run", str(path)]))  # as of one that is spawned
        return run_job(path)

    _quiet()
    return serve(modules, forked)


def debug_job(path: Path) -> int:
    """Run one job in a terminal, with pdb where it raises; return the exit code. Nothing is written for a parent."""
    job = Job.load(path)
    module, _, function = job.entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(job)
    except Exception as error:  # the child's top, as in run_job
        traceback.print_exc()
        pdb.post_mortem(error.__traceback__)
        return 1
    return 0


def _write_answer(answer: dict[str, Any], path: Path, *, first_wins: bool) -> None:
    """Write it whole or not at all. Of several ranks the first wins: when one fails, others fail after it."""
    draft = path.with_name(f"result.draft-{os.getpid()}.json")
    draft.write_text(json.dumps(answer, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not first_wins:
        draft.replace(path)
        return
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def requested_gib(error: Exception) -> float | None:
    """GiB that torch could not get, read from its message; 0 where it names no size, None for any other error."""
    if type(error).__name__ == "OutOfMemoryError":
        size = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
        return float(size[1]) * UNITS[size[2]] / GIB if size else 0.0
    size = re.search(r"DefaultCPUAllocator: .*you tried to allocate (\d+) bytes", str(error))
    return int(size[1]) / GIB if size else None


def _as_problem(job: Job, error: Exception) -> Problem:
    where = f"{job.stage}/{job.slug}"
    if is_full(error) or not has_space(job.out):
        return full(job.out, where)
    if (gib := requested_gib(error)) is not None:
        memory = "GPU" if type(error).__name__ == "OutOfMemoryError" else "host"
        fields = MEMORY_FIELDS.get(job.stage)
        remedy = f"lower {' or '.join(fields)}" if fields else "free memory there"
        return Problem(
            what=f"out of {memory} memory: {job.stage} asked for {gib:.2f} GiB more",
            where=where,
            why=str(error).splitlines()[0],
            next=f"{remedy}; running the same command again resumes",
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Problem(
        what=f"{type(error).__name__}: {error}",
        where=f"{where}, {Path(last.filename).name}:{last.lineno} in {last.name}",
        why="the job ended with an exception that it does not expect",
        next="read the log named below; running the same command again resumes from what is finished",
    )


def main(argv: list[str]) -> int:
    """Command line of a child."""
    match argv:
        case ["guard", "--", *words]:
            return guard(words)
        case ["run" | "debug" as how, path]:
            if how == "run":
                die_with_parent()
            verify_checkout()
            try:
                return run_job(Path(path)) if how == "run" else debug_job(Path(path))
            except StageError as error:  # job.json is of another version of Quench
                print(error, file=sys.stderr)
                return 1
        case ["warm", *modules]:
            die_with_parent()
            verify_checkout()
            return _warm(modules)
        case ["exec", "--", program, *rest]:
            die_with_parent()
            os.execvp(program, [program, *rest])
        case _:
            print(
                "usage: python -P -m tasks.runtime.process.child {run,debug} JOB.json | warm MODULE ... | "
                "{exec,guard} -- PROGRAM ARGS",
                file=sys.stderr,
            )
            return 2


if __name__ == "__main__":
    # os._exit: interpreter shutdown with torch loaded costs seconds and has nothing left to do
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
