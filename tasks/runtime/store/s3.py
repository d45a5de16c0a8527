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
from tasks.runtime.store.bucket import Bucket, Listed
from tasks.runtime.store.bucket_lock import EXPIRY_S, remote_lock
from tasks.runtime.store.local import (
    MANIFEST,
    Artifact,
    Lookup,
    LostRaceError,
    Store,
    StoreTrouble,
    flocked,
    read_json,
    write_json,
)

TRIES = 3  # of a download that arrives with other bytes


@dataclass(frozen=True, kw_only=True)
class Away(Artifact):
    """An artifact in the bucket; path and folder are where its files will lie.

    Attributes:
        key: Of its manifest.
        etag: Of its manifest.
        made: Its manifest.
    """

    key: str
    etag: str
    made: Mapping[str, Any]


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
        content = {name: one["sha256"] for name, one in manifest["files"].items()}
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
        if here := self._cached(key):
            return Lookup(artifact=here, why="hit")
        there = self._manifests(stage, fingerprint)
        if key in there and (held := self.bucket.read(key)):
            if self._damaged.get(key) == held.etag:
                return Lookup(artifact=None, why="damaged in the bucket")
            return Lookup(artifact=None, why="in the bucket", away=self._away(key, held.etag, json.loads(held.body)))
        local = super().find(stage, fingerprint, inputs)
        if local.artifact:
            return Lookup(artifact=None, why="made here, not in the bucket yet", away=local.artifact)
        return Lookup(artifact=None, why="input was remade" if there and local.why == "not made yet" else local.why)

    def _cached(self, key: str) -> Artifact | None:
        mark = self.marks / key
        if not mark.is_file():
            return None
        folder = self.root / mark.read_text(encoding="utf-8")
        return self.fetch(folder) if self._is_whole(folder) else None

    def _is_whole(self, folder: Path) -> bool:
        return (folder / MANIFEST).is_file() and not self.damage(folder, read_json(folder / MANIFEST))

    def _manifests(self, stage: str, fingerprint: str) -> dict[str, Listed]:
        return {one.key: one for one in self.bucket.listed(f"manifests/{stage}/{fingerprint}/")}

    def _away(self, key: str, etag: str, made: dict[str, Any]) -> Away:
        for name in (self.place(made), *made["files"]):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise StoreTrouble([_outside(f"{self.bucket.url}/{key}", name)])
        folder = self.root / self.place(made)
        path, digest = folder / "files", made["digest"]
        if made["stage"] == "choose":  # it stands for what it names
            chosen = made["inputs"][made["result"]["candidate"]]
            path, digest = self.home / chosen["path"], chosen["digest"]
        return Away(
            fingerprint=made["fingerprint"], digest=digest, path=path, folder=folder, key=key, etag=etag, made=made
        )

    def download_bytes(self, found: Lookup) -> int:
        """What `bring` would download."""
        return sum(one["size"] for one in found.away.made["files"].values()) if isinstance(found.away, Away) else 0

    # ---- from the bucket

    def bring(self, found: Lookup) -> Artifact | None:
        """Download what was found in the bucket, each file verified by its sha256; what is damaged there is None."""
        away = found.away
        if found.artifact or not isinstance(away, Away):
            return found.artifact
        name = self.place(away.made)
        gate = self.lock_file("fetch", hashlib.sha256(name.encode()).hexdigest())
        with flocked(gate, stop=self.bucket.stop):
            folder = self.root / name
            if not self._is_whole(folder) and (damage := self._download(name, away.made)):
                self._damaged[away.key] = away.etag
                self.bucket.say(f"damaged in the bucket, made again: {name}: {damage}")
                return None
            self._mark(away.key, name)
            return self.fetch(folder)

    def _download(self, name: str, made: Mapping[str, Any]) -> str | None:
        """Bring an artifact's files into the cache; says what is wrong with them in the bucket, or None."""
        base = f"store/{name}/files/"
        there = {one.key.removeprefix(base): one.size for one in self.bucket.listed(base)}
        for file, one in made["files"].items():
            if there.get(file) != one["size"]:
                return f"{file} is missing" if file not in there else f"{file} has {there[file]} bytes"
        draft = self.partial / ".from-bucket" / name  # what is whole in it stays: the next try goes on from there
        missing = self._other(draft, made)
        for _ in range(TRIES):
            total = sum(made["files"][file]["size"] for file in missing)
            self.bucket.receive({base + file: draft / "files" / file for file in missing}, total=total)
            missing = self._other(draft, made)
            if not missing:
                break
            self.bucket.say(f"arrived with other bytes, downloading again: {name}: {', '.join(missing)}")
        if missing:
            shutil.rmtree(draft)
            return f"{missing[0]} has another sha256 than the manifest says"
        for file in made["files"]:
            (draft / "files" / file).chmod(0o444)
        write_json(draft / MANIFEST, made)
        self._rename(draft, self.root / name)
        return None

    def _other(self, draft: Path, made: Mapping[str, Any]) -> list[str]:
        """Files of a draft that are not there or have other bytes; these are removed."""
        (draft / "files").mkdir(parents=True, exist_ok=True)
        found: list[str] = []
        for file, one in made["files"].items():
            path = draft / "files" / file
            if not path.is_file() or path.stat().st_size != one["size"] or file_digest(path) != one["sha256"]:
                path.unlink(missing_ok=True)
                found.append(file)
        return found

    def _rename(self, draft: Path, folder: Path) -> None:
        target = self._free(folder)  # what is damaged there goes aside
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(target)

    def _mark(self, key: str, name: str, *, folder: str | None = None) -> None:
        """Note that the bucket has what lies here as `name`, and as `folder` from before."""
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
        """Upload an artifact that this home has under another bucket's name or none, and keep it under this one's."""
        made = read_json(folder / MANIFEST)
        if self.damage(folder, made, digests=True):
            return None
        made["inputs"] = {role: {**one, "path": self._shared(one["path"])} for role, one in made["inputs"].items()}
        key, name = self._upload(folder, made), self.place(made)
        if not self._is_whole(self.root / name):
            draft = self.partial / ".from-bucket" / name
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(folder / "files", draft / "files", copy_function=os.link)
            write_json(draft / MANIFEST, made)
            self._rename(draft, self.root / name)
        self._mark(key, name)
        self._mark(key, name, folder=str(folder.relative_to(self.root)))
        return self.fetch(self.root / name)

    def _shared(self, path: str) -> str:
        """An input's path as every home has it."""
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
        key = _manifest_key(stage, fingerprint, {role: one["digest"] for role, one in manifest["inputs"].items()})
        body = json.dumps(manifest, indent=2, sort_keys=True, default=str).encode()
        there = self._manifests(stage, fingerprint)
        broken = self._damaged.get(key)
        if key in there and there[key].etag != broken:
            if (held := self.bucket.read(key)) and held.body == body:
                return key  # ours: a kill came between this and the cache
            raise LostRaceError(fingerprint)
        name = self.place(manifest)
        self._clean(manifest, keep={name, *map(self._named, there)})
        base = f"store/{name}/files/"
        files = {base + file: folder / "files" / file for file in manifest["files"]}
        sizes = {one.key: one.size for one in self.bucket.listed(base)}
        self.bucket.send({at: path for at, path in files.items() if sizes.get(at) != path.stat().st_size or broken})
        sizes = {one.key: one.size for one in self.bucket.listed(base)}
        if gone := [at for at, path in files.items() if sizes.get(at) != path.stat().st_size]:
            raise StoreTrouble([_removed(f"{self.bucket.url}/{gone[0]}")])
        etag = self.bucket.replace(key, body, etag=broken) if broken else self.bucket.create(key, body)
        if etag is None:
            raise LostRaceError(fingerprint)
        self._damaged.pop(key, None)
        return key

    def _named(self, key: str) -> str:
        held = self.bucket.read(key)
        return self.place(json.loads(held.body)) if held else ""

    def _clean(self, manifest: Mapping[str, Any], *, keep: set[str]) -> None:
        """Remove what killed uploads of the same step left, under its lock: no manifest names it."""
        step = f"store/{self.address(manifest['stage'], manifest['slug'], manifest['fingerprint'])}-"
        self.bucket.drop_unfinished(step)
        for one in self.bucket.listed(step):
            if "/".join(one.key.split("/")[1:3]) not in keep:
                self.bucket.remove(one.key)

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


def _manifest_key(stage: str, asked_for: str, inputs: Mapping[str, str]) -> str:
    return f"manifests/{stage}/{asked_for}/{fingerprint({'inputs': dict(inputs)})[:16]}.json"


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
