"""How a child that failed was started, kept beside its log, and how the same job is started again by hand.

It is started again in a folder of its own, with a copy of job.json: neither the attempt nor the store is touched, and
whoever looks for a fault may change what the job is asked for.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.secrets import hide, is_secret
from tasks.runtime.process.environments import interpreter
from tasks.runtime.process.job import ENTRY, Job
from tasks.runtime.process.launch import child_env
from tasks.runtime.store.local import read_json, write_json

STARTED = "child.json"  # beside job.json; only of an attempt that failed
JOB = "job.json"
# The terminal's own, where a job is repeated; PYTHONBREAKPOINT names the debugger that breakpoint() opens.
TERMINAL = ("TERM", "COLORTERM", "COLUMNS", "LINES", "NO_COLOR", "PYTHONBREAKPOINT")
SHELL = ("_", "SHLVL", "PWD", "OLDPWD", *TERMINAL)  # differ from shell to shell and mean nothing to a job


def keep_start(attempt: Path, *, python: Path, env: Mapping[str, str]) -> None:
    """Write how a child was started, without secrets; a full disk keeps it from nothing but this."""
    plain = {name: text for name, text in env.items() if not is_secret(name, text) and hide(text) == text}
    with contextlib.suppress(OSError):
        (attempt / STARTED).touch(mode=0o600)
        write_json(attempt / STARTED, {"schema": 1, "python": str(python), "cwd": str(attempt), "env": plain})
        (attempt / STARTED).chmod(0o600)


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A job as it is repeated.

    Attributes:
        job: What it is asked for, with folders of its own.
        folder: Its current folder: job.json, files/ and checkpoint/.
        python: Interpreter.
        env: Its environment variables, as they were then.
        kept: The attempt left a record of its environment; else it is that of this terminal.
    """

    job: Job
    folder: Path
    python: Path
    env: Mapping[str, str]
    kept: bool

    def argv(self, *, debugger: bool = False) -> list[str]:
        """The command: the job as a step runs it, or with pdb where it raises."""
        return [str(self.python), *ENTRY, "debug" if debugger else "run", JOB]

    @property
    def line(self) -> str:
        """One line for a shell: the folder, what differs from this terminal's environment, the command."""
        changed = [f"{name}={shlex.quote(text)}" for name, text in sorted(self.env.items()) if _differs(name, text)]
        gone = [f"-u {name}" for name in sorted(os.environ) if name not in self.env and name not in SHELL]
        return (
            f"cd {shlex.quote(str(self.folder))} && rm -rf files && mkdir files && "
            f"{' '.join(['env', *gone, *changed])} {shlex.join(self.argv())}"
        )

    def prepare(self, attempt: Path) -> None:
        """Make its folder: an empty files/, the job, and the attempt's checkpoint, from which a training goes on."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.job.out.mkdir(parents=True)
        checkpoint = attempt.parent / "checkpoint"
        if checkpoint.is_dir():
            shutil.copytree(checkpoint, self.job.checkpoint)
        self.job.checkpoint.mkdir(exist_ok=True)
        self.job.dump(self.folder / JOB)


def repeat_of(attempt: Path, *, into: Path, environment: str | None = None) -> Repeat:
    """The job of an attempt, to be repeated.

    Args:
        attempt: Folder with job.json.
        into: Folder for the repetition; it need not exist.
        environment: Python environment of the child, where the attempt left no record.

    Raises:
        StageError: job.json is one of another version of Quench.
    """
    job = Job.load(attempt / JOB)
    started = read_json(attempt / STARTED) if (attempt / STARTED).is_file() else None
    own = {name: os.environ[name] for name in TERMINAL if name in os.environ}
    return Repeat(
        job=replace(job, out=into / "files", checkpoint=into / "checkpoint"),
        folder=into,
        python=Path(started["python"]) if started else interpreter(environment),
        env={**(started["env"] if started else child_env(threads=job.execution.threads)), **own},
        kept=started is not None,
    )


def _differs(name: str, text: str) -> bool:
    return name not in SHELL and os.environ.get(name) != text
