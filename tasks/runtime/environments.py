"""Python environments: the main one, and one for each backend whose packages cannot live beside ours.

Each has its lock, infra/locks/NAME.txt; `make env-NAME` installs it into .envs/NAME, beside a copy of the lock's
sha256, so that an environment of another lock is refused.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from pathlib import Path

from recipes.problem import Problem
from tasks.runtime.launch import CHECKOUT

LOCKS = CHECKOUT / "infra" / "locks"
INSTALLED = CHECKOUT / ".envs"
MAIN = "main"


def locked_versions(name: str | None = None) -> dict[str, str]:
    """Distribution -> version, from an environment's lock; None is the main one."""
    return _pins(_lock(name))


def lock_digest(name: str | None = None) -> str:
    """sha256 of the lock."""
    return hashlib.sha256(_lock(name).read_bytes()).hexdigest()


def interpreter(name: str | None = None) -> Path:
    """The Python that a child starts with: this process's own for the main environment."""
    return Path(sys.executable) if name is None else INSTALLED / name / "bin" / "python"


def environment_problem(name: str | None) -> Problem | None:
    """Why nothing can start in an environment on this machine; None where it can."""
    if name is None:
        return None
    stamp = INSTALLED / name / ".installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8").strip() == lock_digest(name):
        return None
    return Problem(
        what=f"The environment {name} is {'of another lock' if stamp.exists() else 'not installed'}.",
        where=str(stamp.parent.relative_to(CHECKOUT)),
        why="Its packages ask for other versions than ours, so they have a Python environment of their own.",
        next=f"Run: make env-{name}",
    )


def described(name: str | None) -> dict[str, object]:
    """What a manifest says of the environment: name, sha256 of the lock and, besides the main one, every version."""
    found: dict[str, object] = {"name": name or MAIN, "lock": lock_digest(name)}
    return found if name is None else found | {"versions": locked_versions(name)}


def _lock(name: str | None) -> Path:
    return LOCKS / f"{name or MAIN}.txt"


@functools.cache
def _pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE))
