"""Python environments: the main one, and one for each backend whose packages cannot live beside ours.

Each has its lock, infra/locks/NAME.txt; `make env-NAME` installs it into .envs/NAME, beside a copy of the lock's
sha256, so that an environment of another lock is refused. One may have a second lock for machines with an NVIDIA GPU,
NAME-cuda.txt: the sha256 tells which of the two was installed, and that is the one that counts.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.problem import Problem
from tasks.runtime.process.launch import CHECKOUT

LOCKS = CHECKOUT / "infra" / "locks"
INSTALLED = CHECKOUT / ".envs"
MAIN = "main"


def locked_versions(name: str | None = None) -> dict[str, str]:
    """Distribution -> version, from an environment's lock; None is the main one."""
    return _pins(_lock(name))


def installed(names: Sequence[str]) -> dict[str, str]:
    """Version of each distribution that this Python has, without the build (`+cpu`, `+cu130`)."""
    by_name = {name: _installed(name) for name in names}
    return {name: version for name, version in by_name.items() if version is not None}


def versions(names: Sequence[str], environment: str | None = None) -> dict[str, str]:
    """Versions that an environment's children import: of the main one as they are installed here, not as locked.

    Another environment is refused unless it was installed from its lock (`environment_problem`), so the lock counts.

    Raises:
        KeyError: Neither installed nor locked.
    """
    locked = locked_versions(environment)
    present = installed(names) if environment is None else {}
    return {name: present.get(name) or locked[name] for name in names}


def off_lock() -> dict[str, str]:
    """Distributions of the main lock that are installed in another version -> that version."""
    locked = locked_versions()
    return {name: version for name, version in installed(list(locked)).items() if version != locked[name]}


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
    stamp = _stamp(name)
    if stamp == lock_digest(name):
        return None
    return Problem(
        what=f"The environment {name} is {'of another lock' if stamp else 'not installed'}.",
        where=str((INSTALLED / name).relative_to(CHECKOUT)),
        why="Its packages ask for other versions than ours, so they have a Python environment of their own.",
        next=f"Run: make env-{name}",
    )


def described(name: str | None) -> dict[str, object]:
    """What a manifest says of the environment: name, sha256 of the lock, and versions.

    Of another environment all versions, of the main one those that differ from the lock.
    """
    environment: dict[str, object] = {"name": name or MAIN, "lock": lock_digest(name)}
    if name is not None:
        return environment | {"versions": locked_versions(name)}
    differing = off_lock()
    return environment | ({"off_lock": differing} if differing else {})


def _lock(name: str | None) -> Path:
    """The lock that an environment was installed from; NAME.txt where it was installed from none of today's."""
    plain, cuda = LOCKS / f"{name or MAIN}.txt", LOCKS / f"{name}-cuda.txt"
    if name is None or not cuda.exists() or _stamp(name) != hashlib.sha256(cuda.read_bytes()).hexdigest():
        return plain
    return cuda


def _stamp(name: str) -> str:
    """sha256 of the lock that an environment was installed from; empty where it is not installed."""
    stamp = INSTALLED / name / ".installed"
    return stamp.read_text(encoding="utf-8").strip() if stamp.exists() else ""


@functools.cache
def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE))
