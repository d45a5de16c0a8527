"""`quench store ls`, `verify` and `gc`.

gc: what no run, no decision about what ships and no step under way reaches, goes. A run is a folder below runs/:
removing it is how its artifacts become free. Reached is what a run's steps.json, the champion's scores in its
promotion.json or promotions.jsonl name, and everything that it was made from.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.gate.section import PROMOTION
from flows.promotion.journal import JOURNAL, records
from tasks.runtime.store.local import MANIFEST, Store, locked_now, read_json
from tasks.runtime.store.open import open_store


def listed(home: Path) -> tuple[list[dict[str, Any]], str]:
    """Every artifact with its size, as JSON and as text."""
    rows: list[dict[str, Any]] = []
    for path in Store(home).manifests():
        manifest = read_json(path)
        rows.append(
            {
                "artifact": _name(path),
                "bytes": sum(one["size"] for one in manifest["files"].values()),
                "finished_at": manifest["finished_at"],
                "digest": manifest["digest"],
            }
        )
    lines = [f"{one['artifact']:<60} {one['bytes'] / 1e6:10.1f} MB  {one['finished_at']}" for one in rows]
    return rows, "\n".join(lines) or "the store is empty"


def verified(home: Path) -> tuple[dict[str, Any], str]:
    """Every byte read: how many artifacts there are, and what is wrong with which; as JSON and as text."""
    store = Store(home)
    manifests = list(store.manifests())
    found = {_name(path): store.damage(path.parent, read_json(path), digests=True) for path in manifests}
    damage = {name: what for name, what in found.items() if what}
    lines = [f"damaged  {name}: {what}" for name, what in damage.items()]
    after = "; the next run makes them again" if damage else ""
    lines.append(f"{len(manifests)} artifacts, {len(damage)} damaged{after}")
    return {"artifacts": len(manifests), "damaged": damage}, "\n".join(lines)


def _name(manifest: Path) -> str:
    return f"{manifest.parent.parent.name}/{manifest.parent.name}"


FRESH_S = 1.0  # age of what is known to be reached; that takes about as long to find out in a store of 10,000


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
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in seen:  # thousands of scores name the same dataset
            continue
        seen.add(path)
        folder = _artifact(home / path, home)
        if folder is not None and folder not in found:
            found.add(folder)
            todo += [one["path"] for one in read_json(folder / MANIFEST)["inputs"].values()]
    return found


def collect(home: Path, *, remove: bool) -> tuple[dict[str, Any], str]:
    """What can go, as JSON and as text; with `remove` it has gone."""
    found = unreached(home)
    gone = removed(home, [one.name for one in found]) if remove else []
    lines = [
        f"{'removed' if one.name in gone else 'unreached':<10}{one.name:<60} {one.size / 1e6:10.1f} MB"
        + ("  stays in the bucket" if one.in_bucket else "")
        for one in found
    ]
    taken = [one for one in found if one.name in gone or not remove]
    free, linked = sum(one.size - one.linked for one in taken), sum(one.linked for one in taken)
    lines.append(
        f"{len(taken)} artifacts that no run and no promotion reaches: {free / 1e6:.1f} MB "
        f"{'are free now' if remove else 'would be free'}, {linked / 1e6:.1f} MB have links elsewhere (MLflow, exports)"
    )
    lines += ["nothing was removed: --yes does it"] if found and not remove else []
    return {"unreached": [vars(one) for one in found], "removed": gone}, "\n".join(lines)


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
        yield from (one["path"] for one in read_json(path)["steps"] if one["path"])
    for path in (home / "runs").glob(f"*/{PROMOTION}"):  # without these scores the run's report would change
        rival = read_json(path)["champion"]
        yield from [rival["evaluate"]] if rival and rival["evaluate"] else ()


def _of_promotions(home: Path) -> Iterator[str]:
    yield from (one["path"] for one in records(home / JOURNAL))


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
        size=sum(one.st_size for one in stats),
        linked=sum(one.st_size for one in stats if one.st_nlink > 1),
    )
