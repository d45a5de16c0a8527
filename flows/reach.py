"""What keeps an artifact in the store: the runs, and the lines of promotions.jsonl, that reach it.

A run is a folder below runs/: remove it, and its artifacts become free. Reached is what a run's steps.json, the scores
of other versions in its promotion.json, or promotions.jsonl name, and everything that those were made from.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.problem import Problem
from tasks.runtime.store.local import MANIFEST, read_json
from tasks.runtime.store.open import open_store

JOURNAL = "promotions.jsonl"  # below QUENCH_HOME; flows/promotion/journal.py writes it
PROMOTION = "promotion.json"  # in the run's folder; flows/promotion/promote.py writes it


def records(path: Path) -> list[dict[str, Any]]:
    """Every line of promotions.jsonl, about any model, oldest first; a half-written last line is skipped.

    Raises:
        RecipeError: Another line is no JSON object. What it decided is not known, so nobody goes on without it.
    """
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [_record(line, path, number) for number, line in enumerate(whole.split("\n"), 1) if line]


def _record(line: str, path: Path, number: int) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(record := json.loads(line), dict):
            return record
    raise Problem(
        what="The record of promotions is damaged.",
        where=f"{path}, line {number}",
        why="It is no JSON object. Quench writes whole lines, so something else has changed the file.",
        next="Put the line back from a backup, or remove it if nothing of it is needed.",
    ).error()


# ---- what is reached


def reached(home: Path) -> set[Path]:
    """Folders of artifacts that runs and promotions.jsonl name, with all that they were made from."""
    return _closed(home, [path for paths in _named(home).values() for path in paths], {})


def reached_by(home: Path) -> dict[str, set[Path]]:
    """The same by who reaches them: `runs/ID`, or `promotions/NAME/VERSION`."""
    known: dict[Path, list[str]] = {}
    return {keeper: _closed(home, paths, known) for keeper, paths in _named(home).items()}


def _named(home: Path) -> dict[str, list[str]]:
    """Paths that each run and each version names, relative to QUENCH_HOME."""
    named: dict[str, list[str]] = {}
    for path in sorted((home / "runs").glob("*/steps.json")):
        if not path.parent.is_symlink():  # runs/latest
            named[f"runs/{path.parent.name}"] = list(_of_run(path))
    for record in records(home / JOURNAL):
        if "path" in record:
            named.setdefault(f"promotions/{record.get('model')}/{record.get('version')}", []).append(record["path"])
    return named


def _of_run(steps: Path) -> Iterator[str]:
    yield from (step["path"] for step in read_json(steps)["steps"] if step["path"])
    promotion = steps.with_name(PROMOTION)
    if promotion.exists():  # without these scores the run's report would change
        record = read_json(promotion)
        yield from (
            other["evaluate"] for name in ("champion", "best") if (other := record.get(name)) and other["evaluate"]
        )


def _closed(home: Path, paths: Iterable[str], known: dict[Path, list[str]]) -> set[Path]:
    """Artifacts in which these paths lie, with all that they were made from.

    Args:
        home: QUENCH_HOME.
        paths: Relative to it.
        known: Artifact -> paths of its inputs, as far as they were read.
    """
    todo, seen = list(paths), set[str]()
    folders: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in seen:  # thousands of scores name the same dataset
            continue
        seen.add(path)
        folder = _artifact(home / path, home)
        if folder is None or folder in folders:
            continue
        folders.add(folder)
        if folder not in known:
            known[folder] = [origin["path"] for origin in read_json(folder / MANIFEST)["inputs"].values()]
        todo += known[folder]
    return folders


def _artifact(path: Path, home: Path) -> Path | None:
    """Folder of the artifact that a path lies in; None for what is not in the store, or not any more."""
    store = home / "store"
    if not path.is_relative_to(store) or len(path.relative_to(store).parts) < 2:
        return None
    folder = store.joinpath(*path.relative_to(store).parts[:2])
    return folder if (folder / MANIFEST).exists() else None


# ---- what is not


@dataclass(frozen=True, kw_only=True)
class Unreached:
    """A committed artifact that can go.

    Attributes:
        name: `<stage>/<folder>`.
        size: Bytes of its files.
        linked: Bytes of these that stay, because MLflow or an export has a hard link.
        in_bucket: The bucket behind this home has it, and keeps it.
    """

    name: str
    size: int
    linked: int
    in_bucket: bool = False

    @property
    def free(self) -> int:
        """Bytes that removing it frees."""
        return self.size - self.linked


def unreached(home: Path) -> list[Unreached]:
    """Artifacts that nothing reaches, by name."""
    kept, store = reached(home), open_store(home)
    folders = [path.parent for path in store.manifests() if path.parent not in kept]
    return [replace(measured(folder), in_bucket=store.place_in_bucket(folder) is not None) for folder in folders]


def measured(folder: Path) -> Unreached:
    """An artifact as gc would free it."""
    stats = [path.stat() for path in (folder / "files").rglob("*") if path.is_file()]
    return Unreached(
        name=artifact_name(folder),
        size=sum(stat.st_size for stat in stats),
        linked=sum(stat.st_size for stat in stats if stat.st_nlink > 1),
    )


def artifact_name(folder: Path) -> str:
    """`<stage>/<folder>`."""
    return f"{folder.parent.name}/{folder.name}"
