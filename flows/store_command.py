"""`quench store ls` and `quench store verify`: what is stored, and whether it is what the manifests say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.runtime.store import Store, read_json


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
