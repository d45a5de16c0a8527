"""A full disk, told in four parts: of an error, or of an end that could not even be written down."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from recipes.problem import Problem

FULL = (errno.ENOSPC, errno.EDQUOT)
SAID = ("No space left on device", "Disk quota exceeded", "database or disk is full")
LEAST_BYTES = 1 << 20  # with less free, a child can leave neither its result nor a line in its log


def is_full(error: BaseException) -> bool:
    """True where an error says so, by number or, where a library has made a text of it, by words; causes included."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in FULL or any(words in str(seen) for words in SAID):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def has_space(folder: Path) -> bool:
    """False where next to nothing is free."""
    return shutil.disk_usage(folder).free >= LEAST_BYTES


def full(folder: Path, where: str) -> Problem:
    """The disk below a folder is full."""
    free = shutil.disk_usage(folder).free / (1 << 20)
    return Problem(
        what="the disk is full",
        where=where,
        why=f"{free:.1f} MiB are free where {folder} lies; what had finished is in the store, whole",
        next="free space there (`quench store gc` says what nobody needs); running the same command again resumes",
    )
