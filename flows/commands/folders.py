"""Folders that a command reads and the one that it writes: found and checked before anything is started."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from recipes.problem import Problem
from recipes.schema import is_hub_id
from tasks.runtime.hub.ids import Kind, Snapshot
from tasks.runtime.pin import snapshot


def find_input(role: str, name: str, *, kind: Kind) -> Snapshot:
    """A folder, or a hub id's snapshot.

    Raises:
        RecipeError: It is neither, or cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Snapshot(folder=folder.resolve(), source=name)
    if is_hub_id(name, folder=Path.cwd()):
        return snapshot(name, revision=None, kind=kind, field=f"{role} {name}")
    raise Problem(
        what=f"The {role} is not there.",
        where=name,
        why="It is neither a folder nor a hub id (org/name).",
        next="Check the path.",
    ).error()


def check_output(out: Path, *, word: str, inputs: Sequence[Path]) -> Iterator[Problem]:
    """Whether a folder can be written: new or empty, and outside of what is read.

    Args:
        out: The folder.
        word: What the command line calls it: OUT or DEST.
        inputs: Folders that are read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        yield Problem(
            what=f"{word} is not an empty folder.",
            where=str(out),
            why="Nothing is overwritten: it may be wanted.",
            next="Name another folder, or remove this one.",
        )
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            yield Problem(
                what=f"{word} lies inside a folder that is read.",
                where=str(out),
                why=f"Nothing is written into {folder}.",
                next="Name a folder outside of it.",
            )


def check_disk(out: Path, size: float, *, word: str, content: str) -> Iterator[Problem]:
    """Whether the disk below `out` has room for so many bytes of `content`."""
    parent = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        yield Problem(
            what=f"The disk has {free / 1e9:.1f} GB free, {content} takes {size / 1e9:.1f} GB.",
            where=str(parent),
            why="It would be full in the middle of writing.",
            next=f"Free space, or name {word} on another disk.",
        )
