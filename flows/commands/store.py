"""`quench store ls`, `verify` and `gc`. gc removes what no run, no promotion and no step under way reaches."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from flows.commands.terminal import DONE, FAILED, Output
from flows.reach import artifact_name, reached, unreached
from tasks.runtime.store.local import MANIFEST, Store, find_home, locked_now, read_json


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
                "artifact": artifact_name(path.parent),
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
    checked = {
        artifact_name(path.parent): store.damage(path.parent, read_json(path), digests=True) for path in manifests
    }
    damaged = {name: damage for name, damage in checked.items() if damage}
    lines = [f"damaged  {name}: {damage}" for name, damage in damaged.items()]
    after = "; the next run makes them again" if damaged else ""
    lines.append(f"{len(manifests)} artifacts, {len(damaged)} damaged{after}")
    return Output(
        json={"artifacts": len(manifests), "damaged": damaged},
        text="\n".join(lines),
        code=FAILED if damaged else DONE,
    )


FRESH_S = 1.0  # age of the set of what is reached; in a store of 10,000 artifacts it takes about as long to find


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
    free = sum(artifact.free for artifact in taken)
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
