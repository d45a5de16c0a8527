"""A full disk as a problem: after an error that says so, or after a child that could not even write its result."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from recipes.problem import Problem

FULL = (errno.ENOSPC, errno.EDQUOT)
MESSAGES = ("No space left on device", "Disk quota exceeded", "database or disk is full")
LEAST_BYTES = 1 << 20  # with less free, a child can leave neither its result nor a line in its log


def is_full(error: BaseException) -> bool:
    """Whether an error, or a cause of it, says that the disk is full: by its number, or by a library's message."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in FULL or any(message in str(cause) for message in MESSAGES):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def has_space(folder: Path) -> bool:
    """Whether more than next to nothing is free."""
    return shutil.disk_usage(folder).free >= LEAST_BYTES


def full(folder: Path, where: str) -> Problem:
    """The problem of a full disk below a folder."""
    free = shutil.disk_usage(folder).free / (1 << 20)
    return Problem(
        what="the disk is full",
        where=where,
        why=f"{free:.1f} MiB are free where {folder} lies; what had finished is in the store, whole",
        next="free space there (`quench store gc` says what nobody needs); running the same command again resumes",
    )
