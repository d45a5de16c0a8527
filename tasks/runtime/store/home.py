"""QUENCH_HOME: where it is, can it be written, and is it laid out as this Quench reads it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from recipes.problem import Problem

# Raised when this Quench could no longer read the store, runs or promotions that another one wrote. A home without the
# file is of the time before it: layout 1.
LAYOUT = 1
NAME = "layout"


def home_folder(start: Path | None = None) -> Path:
    """QUENCH_HOME, else the nearest `.quench` from the current folder upwards, else `.quench` here; whatever is in it.

    Raises:
        RecipeError: It begins with `~`, and nobody knows a home.
    """
    here = (start or Path.cwd()).resolve()
    if configured := os.environ.get("QUENCH_HOME"):
        try:
            return Path(configured).expanduser().resolve()
        except RuntimeError as error:
            raise Problem(
                what="QUENCH_HOME begins with ~, and there is no home folder",
                where=f"QUENCH_HOME={configured}",
                why=f"{error}: HOME is not set, and the password file has no entry for user id {os.getuid()}",
                next="set QUENCH_HOME to a whole path",
            ).error() from None
    homes = (folder / ".quench" for folder in (here, *here.parents))
    return next((folder for folder in homes if folder.is_dir()), here / ".quench")


def open_home(home: Path) -> None:
    """Make the folder where it is missing, and see that it can be written.

    Raises:
        RecipeError: It cannot, or another layout stands in it.
    """
    check_layout(home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        # Root passes every permission bit, and no bit shows a read-only mount: only writing does.
        with tempfile.NamedTemporaryFile("w", dir=home, encoding="utf-8") as draft:
            draft.write(f"{LAYOUT}\n")
            draft.flush()
            if not (home / NAME).exists():
                Path(home / NAME).hardlink_to(draft.name)
    except FileExistsError:
        if not home.is_dir():
            raise _unwritable(home, "it is a file").error() from None
        # else another process was faster, with the same number
    except OSError as error:
        raise _unwritable(home, f"{error.strerror}: {error.filename or home}").error() from None


def check_layout(home: Path) -> None:
    """Refuse a home that this Quench would read by wrong rules.

    Raises:
        RecipeError: An older or newer Quench wrote this home.
    """
    path = home / NAME
    layout = path.read_text(encoding="utf-8").strip() if path.is_file() else str(LAYOUT)
    if layout == str(LAYOUT):
        return
    older = layout.isdigit() and int(layout) < LAYOUT
    raise Problem(
        what=f"this QUENCH_HOME has layout {layout!r}; this Quench reads layout {LAYOUT}",
        where=str(path),
        why=f"{'an older' if older else 'a newer'} Quench wrote it, and reading it by other rules could take "
        "one artifact for another",
        next="set QUENCH_HOME to another folder, or use that other Quench on this one",
    ).error()


def _unwritable(home: Path, why: str) -> Problem:
    return Problem(
        what="QUENCH_HOME cannot be written",
        where=str(home),
        why=why,
        next="make it writable, or set QUENCH_HOME to a folder that is; free space there if the disk is full",
    )
