"""How an artifact's files come into MLflow without a second copy: hard links, or names of what a bucket has."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.utils.file_utils import local_file_uri_to_path

REFERENCE_BYTES = 1 << 20  # a file of the bucket that is at least so large is named, not sent; weights always are


def link_tree(source: Path, target: Path, *, names: Iterable[str] | None = None) -> None:
    """Hard-link the files of `source` below `target`; across file systems they are copied."""
    files = [source / name for name in names] if names is not None else list(source.rglob("*"))
    for path in files:
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                os.link(path, place)
            except OSError:  # another file system
                place.write_bytes(path.read_bytes())


def lost_folder(uri: str | None) -> Path | None:
    """The folder that MLflow names for files, where it was on this machine and is gone; else None."""
    if uri is None or not uri.startswith("file:"):
        return None
    folder = Path(local_file_uri_to_path(uri))
    return None if folder.is_dir() else folder


class Parted(NamedTuple):
    """An artifact's files by name: those to send, and what references.json says of the others."""

    small: dict[str, Path]
    references: dict[str, dict[str, Any]]


def parted(files: Path, place: str) -> Parted:
    """Small files, and where the bucket has the large ones.

    Args:
        files: The artifact's files here.
        place: URL of the same folder in the bucket.
    """
    small: dict[str, Path] = {}
    references: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(files)), path.stat().st_size
        if path.suffix == ".safetensors" or size >= REFERENCE_BYTES:
            references[name] = {"uri": f"{place}/{name}", "bytes": size}
        else:
            small[name] = path
    return Parted(small, references)
