"""Pinning: from what a recipe names to bytes with a digest. The one door to a hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tasks.runtime.fingerprint import file_digest, fingerprint
from tasks.runtime.hub.ids import HubId, Kind, Snapshot
from tasks.runtime.step import External
from tasks.runtime.store.local import read_json, write_json


class Digests:
    """sha256 of external files, remembered by path, size and time of change: a 16 GB base is read once."""

    def __init__(self, home: Path) -> None:
        self.path = home / "digests.json"
        self._known: dict[str, dict[str, str]] = read_json(self.path) if self.path.exists() else {}

    def of(self, path: Path) -> str:
        """Digest of one file."""
        stat = path.stat()
        mark = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        known = self._known.get(str(path))
        if known is None or known["mark"] != mark:
            known = {"mark": mark, "sha256": file_digest(path)}
            self._known[str(path)] = known
        return known["sha256"]

    def save(self) -> None:
        """Keep what was read for the next run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._known)


def external_file(name: str, path: Path, *, digests: Digests, source: str = "") -> External:
    """One file as an input."""
    return External(name=name, path=path.resolve(), digest=digests.of(path.resolve()), source=source or path.name)


def external_folder(name: str, path: Path, *, patterns: Iterable[str], digests: Digests, source: str = "") -> External:
    """The files of a folder that match `patterns`, as one input: names and bytes, wherever the folder lies."""
    root = path.resolve()
    files = sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()})
    content = {str(file.relative_to(root)): digests.of(file.resolve()) for file in files}
    return External(name=name, path=root, digest=fingerprint({"files": content}), source=source or path.name)


def snapshot(repository: str, *, revision: str | None, kind: Kind, field: str) -> Snapshot:
    """Download `org/name` at a revision, pinned to the commit that it names now; see `snapshots`."""
    return snapshots([HubId(name=repository, revision=revision, kind=kind, field=field)])[0]


def snapshots(hub_ids: Sequence[HubId]) -> list[Snapshot]:
    """Download repositories, each pinned to the commit that its revision names now.

    All are looked at before the first weight is fetched: does it exist, may we read it, does it hold what is expected.
    A hub that cannot be reached is no error where the cache has everything: then the commit is the one used last.

    Raises:
        RecipeError: All that is wrong with any of them.
    """
    if not hub_ids:
        return []
    from tasks.runtime.hub import fetch  # huggingface_hub takes 0.5 s; local folders do without it

    return fetch.snapshots(hub_ids)


def headers_only(hub: HubId, folder: Path) -> Snapshot:
    """A model of a hub as far as config, tokenizer and safetensors headers go; no weight is downloaded.

    Args:
        hub: The model.
        folder: An empty folder, where it is laid out: files of weights with their headers and holes behind them. Where
            the cache has the whole model, its folder is answered and this one stays empty.

    Raises:
        RecipeError: It cannot be read, or is none.
    """
    from tasks.runtime.hub import headers

    return headers.headers_only(hub, folder)
