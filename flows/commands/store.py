"""`quench store ls`, `verify` and `gc`.

gc removes what no run, no promotion and no step under way reaches. A run is a folder below runs/: remove it, and its
artifacts become free. Reached is what a run's steps.json, the scores of other versions in its promotion.json, or
promotions.jsonl name, and everything that those were made from.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.commands.terminal import DONE, FAILED, Output
from flows.gate.section import PROMOTION
from flows.promotion.journal import JOURNAL, records
from tasks.runtime.store.local import MANIFEST, Store, find_home, locked_now, read_json
from tasks.runtime.store.open import open_store


def ls(args: argparse.Namespace) -> Output:
    """List every artifact."""
    return listed(find_home())


def verify(args: argparse.Namespace) -> Output:
    """Verify every artifact; exit code 1 where one is damaged."""
    return verified(find_home())


def gc(args: argparse.Namespace) -> Output:
    """Say what can go; with --yes, remove it."""
    return collect(find_home(), remove=args.yes)


def listed(home: Path) -> Output:
    """Every artifact with its size."""
    rows: list[dict[str, Any]] = []
    for path in Store(home).manifests():
        manifest = read_json(path)
        rows.append(
            {
                "artifact": _name(path),
                "bytes": sum(file["size"] for file in manifest["files"].values()),
                "finished_at": manifest["finished_at"],
                "digest": manifest["digest"],
            }
        )
    lines = [f"{row['artifact']:<60} {row['bytes'] / 1e6:10.1f} MB  {row['finished_at']}" for row in rows]
    return Output(json=rows, text="\n".join(lines) or "the store is empty")


def verified(home: Path) -> Output:
    """Every byte read: how many artifacts there are, and what is wrong with which."""
    store = Store(home)
    manifests = list(store.manifests())
    checked = {_name(path): store.damage(path.parent, read_json(path), digests=True) for path in manifests}
    damaged = {name: damage for name, damage in checked.items() if damage}
    lines = [f"damaged  {name}: {damage}" for name, damage in damaged.items()]
    after = "; the next run makes them again" if damaged else ""
    lines.append(f"{len(manifests)} artifacts, {len(damaged)} damaged{after}")
    return Output(
        json={"artifacts": len(manifests), "damaged": damaged},
        text="\n".join(lines),
        code=FAILED if damaged else DONE,
    )


def _name(manifest: Path) -> str:
    return f"{manifest.parent.parent.name}/{manifest.parent.name}"


FRESH_S = 1.0  # age of the set of what is reached; in a store of 10,000 artifacts it takes about as long to find


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


def unreached(home: Path) -> list[Unreached]:
    """Artifacts that nothing reaches, by name."""
    kept, store = reached(home), open_store(home)
    folders = [path.parent for path in store.manifests() if path.parent not in kept]
    return [replace(_measured(folder), in_bucket=store.place_in_bucket(folder) is not None) for folder in folders]


def reached(home: Path) -> set[Path]:
    """Folders of artifacts that runs and promotions.jsonl name, with all that they were made from."""
    todo = [*_of_runs(home), *_of_promotions(home)]
    seen: set[str] = set()
    folders: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in seen:  # thousands of scores name the same dataset
            continue
        seen.add(path)
        folder = _artifact(home / path, home)
        if folder is not None and folder not in folders:
            folders.add(folder)
            todo += [origin["path"] for origin in read_json(folder / MANIFEST)["inputs"].values()]
    return folders


def collect(home: Path, *, remove: bool) -> Output:
    """What can go; with `remove` it has gone."""
    artifacts = unreached(home)
    gone = removed(home, [artifact.name for artifact in artifacts]) if remove else []
    lines = [
        f"{'removed' if artifact.name in gone else 'unreached':<10}{artifact.name:<60} {artifact.size / 1e6:10.1f} MB"
        + ("  stays in the bucket" if artifact.in_bucket else "")
        for artifact in artifacts
    ]
    taken = [artifact for artifact in artifacts if artifact.name in gone or not remove]
    linked = sum(artifact.linked for artifact in taken)
    free = sum(artifact.size for artifact in taken) - linked
    lines.append(
        f"{len(taken)} artifacts that no run and no promotion reaches: {free / 1e6:.1f} MB "
        f"{'are free now' if remove else 'would be free'}, {linked / 1e6:.1f} MB have links elsewhere (MLflow, exports)"
    )
    lines += ["nothing was removed: --yes does it"] if artifacts and not remove else []
    return Output(
        json={"unreached": [vars(artifact) for artifact in artifacts], "removed": gone}, text="\n".join(lines)
    )


def removed(home: Path, names: list[str]) -> list[str]:
    """Remove artifacts that still nothing reaches and no step under way holds; returns the names of the removed."""
    gone: list[str] = []
    kept, at = reached(home), time.monotonic()
    for name in names:
        if time.monotonic() - at > FRESH_S:  # runs go on meanwhile; once for each name would take hours for thousands
            kept, at = reached(home), time.monotonic()
        folder = home / "store" / name
        manifest = read_json(folder / MANIFEST)
        with locked_now(Store(home).lock_file(manifest["stage"], manifest["fingerprint"])) as ours:
            if ours and folder not in kept:
                aside = folder.with_name(f".gone-{folder.name}")  # at once: half an artifact is none
                folder.rename(aside)
                shutil.rmtree(aside)
                gone.append(name)
    return gone


def _of_runs(home: Path) -> Iterator[str]:
    for path in (home / "runs").glob("*/steps.json"):
        yield from (step["path"] for step in read_json(path)["steps"] if step["path"])
    for path in (home / "runs").glob(f"*/{PROMOTION}"):  # without these scores the run's report would change
        record = read_json(path)
        yield from (
            other["evaluate"] for name in ("champion", "best") if (other := record.get(name)) and other["evaluate"]
        )


def _of_promotions(home: Path) -> Iterator[str]:
    yield from (record["path"] for record in records(home / JOURNAL) if "path" in record)


def _artifact(path: Path, home: Path) -> Path | None:
    """Folder of the artifact that a path lies in; None for what is not in the store, or not any more."""
    store = home / "store"
    if not path.is_relative_to(store) or len(path.relative_to(store).parts) < 2:
        return None
    folder = store.joinpath(*path.relative_to(store).parts[:2])
    return folder if (folder / MANIFEST).exists() else None


def _measured(folder: Path) -> Unreached:
    stats = [path.stat() for path in (folder / "files").rglob("*") if path.is_file()]
    return Unreached(
        name=f"{folder.parent.name}/{folder.name}",
        size=sum(stat.st_size for stat in stats),
        linked=sum(stat.st_size for stat in stats if stat.st_nlink > 1),
    )
