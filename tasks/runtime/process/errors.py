"""Errors that cross the process border between a job and its parent."""

from __future__ import annotations

import shlex
from pathlib import Path

from recipes.problem import Problem


class StageError(Exception):
    """A job refuses or fails for a reason that it can explain in four parts (what, where, why, next)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.problem,))  # from a worker of a pool, whole

    @classmethod
    def of(cls, *, what: str, where: str, why: str, next: str) -> StageError:
        """The refusal for the problem of these four parts: `raise StageError.of(what=..., ...)`."""
        return cls(Problem(what=what, where=where, why=why, next=next))


class StepFailed(Exception):
    """A step's child ended without a result. Never stored; re-running the recipe tries again.

    Attributes:
        step: `stage/slug`.
        problem: The four parts, from the job where it could say, else made from exit code and log.
        log: The attempt's log file.
        returncode: Exit code of the child; negative is a signal.
    """

    def __init__(self, step: str, problem: Problem, *, log: str, returncode: int) -> None:
        self.step = step
        self.problem = problem
        self.log = log
        self.returncode = returncode
        again = f"\n  again: quench debug {shlex.quote(str(Path(log).parent))}" if log.startswith("/") else ""
        super().__init__(f"{step} failed (exit {returncode})\n{problem}\n  log:   {log}{again}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.step, self.problem, self.log, self.returncode))


def _rebuild(step: str, problem: Problem, log: str, returncode: int) -> StepFailed:
    return StepFailed(step, problem, log=log, returncode=returncode)
