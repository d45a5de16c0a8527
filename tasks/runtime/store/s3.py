"""The store in a bucket, with a home as its cache: the second implementation of find / begin / commit / fetch / lock.

    PREFIX/manifests/<stage>/<fingerprint>/<digest of the input digests>.json    put last, if nobody was first
    PREFIX/store/<stage>/<slug>-<fp12>-<content12>/files/...                     the artifact's files
    PREFIX/locks/<stage>-<fp12>.json                                             see remote_lock

An artifact exists for others when its manifest does. A folder's name holds a digest of its files' bytes, so that two
machines that upload the same step never write one object with two contents, a repeated upload is the same upload, and
a path is the same in every home. Jobs read and write local files; what a home has of this bucket is noted in
`in-bucket/`, so that a hit in the cache asks nobody.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.problem import Problem
from tasks.runtime.fingerprint import file_digest, fingerprint
from tasks.runtime.store.bucket import Bucket, ObjectSummary
from tasks.runtime.store.bucket_lock import EXPIRY_S, remote_lock
from tasks.runtime.store.local import (
    MANIFEST,
    Artifact,
    Lookup,
    LostRaceError,
    Store,
    StoreTrouble,
    flocked,
    input_digests,
    read_json,
    write_json,
)

TRIES = 3  # of a download that arrives with other bytes


@dataclass(frozen=True, kw_only=True)
class RemoteArtifact(Artifact):
    """An artifact in the bucket; path and folder are where its files will lie.

    Attributes:
        key: Of its manifest.
        etag: Of its manifest.
        recorded: Its manifest.
    """

    key: str
    etag: str
    recorded: Mapping[str, Any]


class S3Store(Store):
    """Artifacts in a bucket; `home` is the cache, and where work happens."""

    def __init__(self, home: Path, bucket: Bucket, *, expiry_s: float = EXPIRY_S) -> None:
        super().__init__(home)
        self.bucket, self.expiry_s = bucket, expiry_s
        self.marks = home / "in-bucket" / hashlib.sha256(bucket.url.encode()).hexdigest()[:12]
        self._damaged: dict[str, str] = {}  # key of a manifest whose files are not there as it says -> its ETag

    def check(self) -> None:
        """See that the bucket can be read and written.

        Raises:
            StoreTrouble: Why not.
        """
        self.bucket.check()

    def place(self, manifest: Mapping[str, Any]) -> str:
        """`<stage>/<slug>-<fp12>-<content12>`, in the bucket and in every home."""
        address = self.address(manifest["stage"], manifest["slug"], manifest["fingerprint"])
        content = {name: file["sha256"] for name, file in manifest["files"].items()}
        return f"{address}-{fingerprint({'files': content})[:12]}"

    def place_in_bucket(self, folder: Path) -> str | None:
        """URL of a local artifact's files in the bucket; None where they are only here."""
        if not folder.is_relative_to(self.root):
            return None
        mark = self.marks / "folders" / folder.relative_to(self.root)
        return f"{self.bucket.url}/store/{mark.read_text(encoding='utf-8')}/files" if mark.is_file() else None

    # ---- finding

    def find(self, stage: str, fingerprint: str, inputs: Mapping[str, str]) -> Lookup:
        """Look in the cache, then in the bucket by the exact key; nothing is downloaded."""
        key = _manifest_key(stage, fingerprint, inputs)
        if artifact := self._cached(key):
            return Lookup(artifact=artifact, why="hit")
        manifests = self._manifests(stage, fingerprint)
        if key in manifests and (stored := self.bucket.read(key)):
            if self._damaged.get(key) == stored.etag:
                return Lookup(artifact=None, why="damaged in the bucket")
            remote = self._remote(key, stored.etag, json.loads(stored.body))
            return Lookup(artifact=None, why="in the bucket", remote=remote)
        local = super().find(stage, fingerprint, inputs)
        if local.artifact:
            return Lookup(artifact=None, why="made here, not in the bucket yet", remote=local.artifact)
        remade = manifests and local.why == "not made yet"
        return Lookup(artifact=None, why="input was remade" if remade else local.why)

    def _cached(self, key: str) -> Artifact | None:
        mark = self.marks / key
        if not mark.is_file():
            return None
        folder = self.root / mark.read_text(encoding="utf-8")
        return self.fetch(folder) if self._is_whole(folder) else None

    def _is_whole(self, folder: Path) -> bool:
        return (folder / MANIFEST).is_file() and not self.damage(folder, read_json(folder / MANIFEST))

    def _manifests(self, stage: str, fingerprint: str) -> dict[str, ObjectSummary]:
        return {listed.key: listed for listed in self.bucket.list_objects(f"manifests/{stage}/{fingerprint}/")}

    def _remote(self, key: str, etag: str, manifest: dict[str, Any]) -> RemoteArtifact:
        for name in (self.place(manifest), *manifest["files"]):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise StoreTrouble([_outside(f"{self.bucket.url}/{key}", name)])
        folder = self.root / self.place(manifest)
        path, digest = folder / "files", manifest["digest"]
        if manifest["stage"] == "choose":  # it stands for the artifact that it names
            chosen = manifest["inputs"][manifest["result"]["candidate"]]
            path, digest = self.home / chosen["path"], chosen["digest"]
        return RemoteArtifact(
            fingerprint=manifest["fingerprint"],
            digest=digest,
            path=path,
            folder=folder,
            key=key,
            etag=etag,
            recorded=manifest,
        )

    def download_bytes(self, lookup: Lookup) -> int:
        """What `bring` would download."""
        if not isinstance(lookup.remote, RemoteArtifact):
            return 0
        return sum(file["size"] for file in lookup.remote.recorded["files"].values())

    # ---- from the bucket

    def bring(self, lookup: Lookup) -> Artifact | None:
        """Download what was found in the bucket, each file verified by its sha256; None where it is damaged there."""
        remote = lookup.remote
        if lookup.artifact or not isinstance(remote, RemoteArtifact):
            return lookup.artifact
        name = self.place(remote.recorded)
        gate = self.lock_file("fetch", hashlib.sha256(name.encode()).hexdigest())
        with flocked(gate, stop=self.bucket.stop):
            folder = self.root / name
            if not self._is_whole(folder) and (damage := self._download(name, remote.recorded)):
                self._damaged[remote.key] = remote.etag
                self.bucket.say(f"damaged in the bucket, made again: {name}: {damage}")
                return None
            self._mark(remote.key, name)
            return self.fetch(folder)

    def _download(self, name: str, manifest: Mapping[str, Any]) -> str | None:
        """Download an artifact's files into the cache; returns what is wrong with them in the bucket, or None."""
        base = f"store/{name}/files/"
        sizes = self._sizes(base)
        for file, expected in manifest["files"].items():
            size = sizes.get(base + file)
            if size != expected["size"]:
                return f"{file} is missing" if size is None else f"{file} has {size} bytes"
        draft = self.partial / ".from-bucket" / name  # what is whole in it stays: the next try goes on from there
        missing = self._drop_incomplete(draft, manifest)
        for _ in range(TRIES):
            total = sum(manifest["files"][file]["size"] for file in missing)
            self.bucket.receive({base + file: draft / "files" / file for file in missing}, total=total)
            missing = self._drop_incomplete(draft, manifest)
            if not missing:
                break
            self.bucket.say(f"arrived with other bytes, downloading again: {name}: {', '.join(missing)}")
        if missing:
            shutil.rmtree(draft)
            return f"{missing[0]} has another sha256 than the manifest says"
        for file in manifest["files"]:
            (draft / "files" / file).chmod(0o444)
        self._into_cache(draft, name, manifest)
        return None

    def _drop_incomplete(self, draft: Path, manifest: Mapping[str, Any]) -> list[str]:
        """Remove a draft's files that have other bytes; returns these and those that are not there."""
        (draft / "files").mkdir(parents=True, exist_ok=True)
        missing: list[str] = []
        for file, expected in manifest["files"].items():
            path = draft / "files" / file
            same_size = path.is_file() and path.stat().st_size == expected["size"]
            if not same_size or file_digest(path) != expected["sha256"]:
                path.unlink(missing_ok=True)
                missing.append(file)
        return missing

    def _into_cache(self, draft: Path, name: str, manifest: Mapping[str, Any]) -> None:
        """Write the manifest beside a draft's files and rename it into the store."""
        write_json(draft / MANIFEST, manifest)
        target = self._free(self.root / name)  # what is damaged there goes aside
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(target)

    def _mark(self, key: str, name: str, *, folder: str | None = None) -> None:
        """Note that the bucket has what lies here as `name`, or lay here before as `folder`."""
        for path in (self.marks / key, self.marks / "folders" / (folder or name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
            draft.write_text(name, encoding="utf-8")
            draft.replace(path)

    # ---- into the bucket

    def take_up(self, stage: str, name: str, fingerprint: str, *, inputs: Mapping[str, str]) -> Artifact | None:
        """Upload what was finished here and is not in the bucket: by a killed process, or before there was a bucket."""
        folder = self.partial / self.address(stage, name, fingerprint)
        if (folder / MANIFEST).exists() and self.damage(folder, read_json(folder / MANIFEST), digests=True):
            return None
        try:
            if finished := super().take_up(stage, name, fingerprint, inputs=inputs):
                return finished
            local = super().find(stage, fingerprint, inputs).artifact
            return self._adopt(local.folder) if local and local.folder else None
        except LostRaceError:
            shutil.rmtree(folder, ignore_errors=True)
            return self.bring(self.find(stage, fingerprint, inputs))

    def _adopt(self, folder: Path) -> Artifact | None:
        """Upload an artifact that this home has without a bucket or from another; keep it by its name in this one."""
        manifest = read_json(folder / MANIFEST)
        if self.damage(folder, manifest, digests=True):
            return None
        manifest["inputs"] = {
            role: {**origin, "path": self._path_in_every_home(origin["path"])}
            for role, origin in manifest["inputs"].items()
        }
        key, name = self._upload(folder, manifest), self.place(manifest)
        if not self._is_whole(self.root / name):
            draft = self.partial / ".from-bucket" / name
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(folder / "files", draft / "files", copy_function=os.link)
            self._into_cache(draft, name, manifest)
        self._mark(key, name)
        self._mark(key, name, folder=str(folder.relative_to(self.root)))
        return self.fetch(self.root / name)

    def _path_in_every_home(self, path: str) -> str:
        """An input's path, under its name in the bucket."""
        folder = (self.home / path).parent
        if not folder.is_relative_to(self.root) or not (folder / MANIFEST).is_file():
            return path
        return f"store/{self.place(read_json(folder / MANIFEST))}/files"

    def _publish(self, folder: Path, manifest: Mapping[str, Any]) -> Artifact:
        key, name = self._upload(folder, manifest), self.place(manifest)
        if self._is_whole(self.root / name):
            shutil.rmtree(folder)
            artifact = self.fetch(self.root / name)
        else:
            artifact = super()._publish(folder, manifest)
        self._mark(key, name)
        return artifact

    def _upload(self, folder: Path, manifest: Mapping[str, Any]) -> str:
        """Files first, the manifest last and exclusively; returns its key.

        Raises:
            LostRaceError: Another machine committed the same request with the same inputs first.
        """
        stage, fingerprint = manifest["stage"], manifest["fingerprint"]
        key = _manifest_key(stage, fingerprint, input_digests(manifest))
        body = json.dumps(manifest, indent=2, sort_keys=True, default=str).encode()
        manifests = self._manifests(stage, fingerprint)
        damaged = self._damaged.get(key)  # ETag of the manifest that this one replaces
        if key in manifests and manifests[key].etag != damaged:
            if (stored := self.bucket.read(key)) and stored.body == body:
                return key  # ours: a kill came between this and the cache
            raise LostRaceError(fingerprint)
        self._remove_leftovers(manifest, keep={self.place(manifest), *map(self._place_of, manifests)})
        self._upload_files(folder, manifest, again=damaged is not None)
        etag = self.bucket.replace(key, body, etag=damaged) if damaged else self.bucket.create(key, body)
        if etag is None:
            raise LostRaceError(fingerprint)
        self._damaged.pop(key, None)
        return key

    def _upload_files(self, folder: Path, manifest: Mapping[str, Any], *, again: bool) -> None:
        """Upload the files that the bucket does not have in their size, or all of them `again`; then see them there."""
        base = f"store/{self.place(manifest)}/files/"
        files = {base + file: folder / "files" / file for file in manifest["files"]}
        self.bucket.send(files if again else _absent(files, self._sizes(base)))
        if removed := list(_absent(files, self._sizes(base))):
            raise StoreTrouble([_removed(f"{self.bucket.url}/{removed[0]}")])

    def _sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of the objects whose keys begin so, by key."""
        return {listed.key: listed.size for listed in self.bucket.list_objects(prefix)}

    def _place_of(self, key: str) -> str:
        """The place that the manifest with this key names."""
        stored = self.bucket.read(key)
        return self.place(json.loads(stored.body)) if stored else ""

    def _remove_leftovers(self, manifest: Mapping[str, Any], *, keep: set[str]) -> None:
        """Remove what killed uploads of the same step left, under its lock: no manifest names it."""
        prefix = f"store/{self.address(manifest['stage'], manifest['slug'], manifest['fingerprint'])}-"
        self.bucket.drop_unfinished(prefix)
        for listed in self.bucket.list_objects(prefix):
            if "/".join(listed.key.split("/")[1:3]) not in keep:
                self.bucket.remove(listed.key)

    # ---- the lock

    @contextlib.contextmanager
    def lock(
        self,
        stage: str,
        fingerprint: str,
        *,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Generator[None]:
        """Hold the home's lock of the step, then the bucket's; see Store.lock and remote_lock."""
        key = f"locks/{stage}-{fingerprint[:12]}.json"
        waits = functools.partial(_waits, say)
        with (
            super().lock(stage, fingerprint, stop=stop, say=say),
            remote_lock(self.bucket, key, home=self._home(), expiry_s=self.expiry_s, stop=stop, waits=waits),
        ):
            yield

    def _home(self) -> str:
        """Names this home among all that use the bucket."""
        path = self.home / "in-bucket" / "home"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".home.{uuid.uuid4().hex}")
        draft.write_text(uuid.uuid4().hex, encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # whole, and once
        draft.unlink()
        return path.read_text(encoding="utf-8")


def _waits(say: Callable[[str], None], owner: str) -> None:
    say(f"waiting for another machine that makes the same step: {owner}")


def _absent(files: Mapping[str, Path], sizes: Mapping[str, int]) -> dict[str, Path]:
    """The files that the bucket does not have in their size."""
    return {key: path for key, path in files.items() if sizes.get(key) != path.stat().st_size}


def _manifest_key(stage: str, step_fingerprint: str, inputs: Mapping[str, str]) -> str:
    return f"manifests/{stage}/{step_fingerprint}/{fingerprint({'inputs': dict(inputs)})[:16]}.json"


def _outside(where: str, name: str) -> Problem:
    return Problem(
        what="A manifest in the bucket names a file outside of its folder.",
        where=where,
        why=f"{name!r} would be written over something else on this machine; Quench writes no such manifest.",
        next="Find out who can write to the bucket; remove this object, and the step is made again.",
    )


def _removed(where: str) -> Problem:
    return Problem(
        what="A file went from the bucket while its artifact was uploaded.",
        where=where,
        why="Somebody removed it, or another machine took this one for dead and cleaned up after it.",
        next="Run it again: what is missing is uploaded.",
    )
