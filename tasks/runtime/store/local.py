"""The store: find / begin / commit / fetch / lock. Addressed by the fingerprint, verified by what came out.

`store/<stage>/<slug>-<fp12>/` holds manifest.json, files/ and the attempts' job.json and log.txt. Work happens in
`partial/<stage>/<slug>-<fp12>/`; the manifest is created exclusively and last, then the folder is renamed.
When an input was remade with other bytes, the same request is made again beside the old one (`-2`, `-3` ...),
so nothing that was finished is lost.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.problem import Problem, RecipeError
from tasks.runtime.fingerprint import difference, file_digest, fingerprint
from tasks.runtime.store.attempt import Attempt
from tasks.runtime.store.home import check_layout, home_folder
from tasks.runtime.store.listing import Listing, list_stage

MANIFEST = "manifest.json"
SCHEMA = 1
# Of a home's own files, by name: the highest number that this Quench reads. Keys that it does not know are left alone.
SCHEMAS = {MANIFEST: SCHEMA, "steps.json": 1, "registered.json": 1, "retrain.json": 1, "child.json": 1}


def find_home(start: Path | None = None) -> Path:
    """QUENCH_HOME, else the nearest `.quench` from the current folder upwards, else `.quench` here.

    Raises:
        RecipeError: It has another layout than this Quench reads, or begins with `~` where nobody knows a home.
    """
    home = home_folder(start)
    check_layout(home)
    return home


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A committed artifact, or an external one (a digest and no history).

    Attributes:
        path: What a job reads: the artifact's files/ folder, or the external file or folder.
        folder: The committed folder with the manifest; None for an external one.
    """

    fingerprint: str
    digest: str
    path: Path
    folder: Path | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, read from disk. Raises FileNotFoundError for an external artifact."""
        if self.folder is None:
            raise FileNotFoundError(f"{self.path} is external: it has no manifest")
        return read_json(self.folder / MANIFEST)


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """Answer of `find`: the artifact, or why there is none.

    Attributes:
        remote: It is finished, but not all of it is here: digests are known, `Store.bring` gets the files. Only a store
            in a bucket has this.
    """

    artifact: Artifact | None
    why: str
    remote: Artifact | None = None


class LostRaceError(Exception):
    """Somebody else committed the same step first; take theirs."""


class StoreTrouble(RecipeError):
    """A home, or the bucket behind it, cannot be used, or fails; what is finished here is kept."""


class Store:
    """Artifacts on a local file system."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "store"
        self.partial = home / "partial"
        self._listed: dict[str, Listing] | None = None

    def snapshot(self) -> Store:
        """A view that lists each stage once, for a plan; a run needs the store itself, with what others made since."""
        view = copy.copy(self)
        view._listed = {}
        return view

    def check(self) -> None:
        """Raise RecipeError where the bucket behind this home cannot be used; here there is none."""

    def bring(self, lookup: Lookup) -> Artifact | None:
        """What was found, with its files here; None where it has to be made."""
        return lookup.artifact

    def download_bytes(self, lookup: Lookup) -> int:
        """What `bring` would download."""
        return 0

    def place_in_bucket(self, folder: Path) -> str | None:
        """URL of an artifact's files in the bucket behind this home; None where they are only here."""
        return None

    def address(self, stage: str, name: str, fingerprint: str) -> str:
        """Folder name of a step: `<slug>-<first 12 hex digits of the fingerprint>`."""
        return f"{stage}/{name}-{fingerprint[:12]}"

    def manifests(self, stage: str | None = None) -> Iterator[Path]:
        """Every committed manifest, oldest name first."""
        yield from sorted(self.root.glob(f"{stage or '*'}/*/{MANIFEST}"))

    def find(self, stage: str, fingerprint: str, inputs: Mapping[str, str]) -> Lookup:
        """Look a step up by fingerprint and by the digests of its inputs as they are in the store now.

        Sizes of all files are checked. A hit needs both keys; otherwise `why` says what is missing.
        """
        why = "not made yet"
        for entry in self._listing(stage, fingerprint[:12]).by_fingerprint.get(fingerprint[:12], []):
            folder = self.root / stage / entry
            manifest = _manifest(folder)
            if manifest is None or manifest["fingerprint"] != fingerprint:
                continue
            digests = input_digests(manifest)
            if digests != dict(inputs):
                changed = [name for name in inputs if digests.get(name) != inputs[name]]
                why = f"input was remade: {', '.join(changed) or 'fewer inputs'}"
                continue
            if damage := self.damage(folder, manifest):
                why = f"damaged: {damage}"
                continue
            return Lookup(artifact=self.fetch(folder, manifest), why="hit")
        return Lookup(artifact=None, why=why)

    def _listing(self, stage: str, part: str) -> Listing:
        """Folders with `part` in their names; in a snapshot all of them, listed once."""
        if self._listed is None:
            return list_stage(self.root / stage, part)
        if stage not in self._listed:
            self._listed[stage] = list_stage(self.root / stage)
        return self._listed[stage]

    def fetch(self, folder: Path, manifest: Mapping[str, Any] | None = None) -> Artifact:
        """The artifact in a committed folder. A choice stands for the artifact that it names."""
        recorded: Mapping[str, Any] = manifest or read_json(folder / MANIFEST)
        path, digest = folder / "files", recorded["digest"]
        if recorded["stage"] == "choose":
            chosen = recorded["inputs"][read_json(path / "choice.json")["candidate"]]
            path, digest = self.home / chosen["path"], chosen["digest"]
        return Artifact(fingerprint=recorded["fingerprint"], digest=digest, path=path, folder=folder)

    def damage(self, folder: Path, manifest: Mapping[str, Any], *, digests: bool = False) -> str | None:
        """What is wrong with a committed folder's files, or None. Sizes always, sha256 on request."""
        for name, expected in manifest["files"].items():
            path = folder / "files" / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {expected['size']}"
            if digests and file_digest(path) != expected["sha256"]:
                return f"{name} has another sha256 than the manifest says"
        return None

    def nearest(self, stage: str, name: str, identity: Mapping[str, Any]) -> list[str]:
        """Where a step's identity differs from the closest artifact of the same stage and slug, for the plan."""
        best: list[str] = []
        for entry in self._listing(stage, name).by_name.get(name, []):
            manifest = _manifest(self.root / stage / entry)
            fields = difference(manifest["identity"], identity) if manifest else []
            if fields and (not best or len(fields) < len(best)):
                best = fields
        return best

    @contextlib.contextmanager
    def lock(
        self,
        stage: str,
        fingerprint: str,
        *,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Generator[None]:
        """Hold the step's lock: it saves double work. A dead owner's lock is free.

        Args:
            stage: The step's stage.
            fingerprint: The step's fingerprint.
            stop: Ends the waiting.
            say: Is called once where another run has the lock.

        Raises:
            InterruptedError: `stop` was set while waiting.
        """
        waits = functools.partial(say, "waiting for another run that makes the same step")
        with flocked(self.lock_file(stage, fingerprint), stop=stop, waits=waits):
            yield

    def lock_file(self, stage: str, fingerprint: str) -> Path:
        """The step's lock file, in a folder that exists."""
        folder = self.home / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{stage}-{fingerprint[:12]}.lock"

    def begin(self, stage: str, name: str, fingerprint: str, *, inputs: Mapping[str, str]) -> Attempt:
        """Open the next attempt in the step's partial folder (under its lock).

        files/ is emptied; checkpoint/ is kept unless it was written for other inputs.
        """
        folder = self.partial / self.address(stage, name, fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        last_inputs = folder / "inputs.json"
        if not last_inputs.exists() or read_json(last_inputs) != dict(inputs):
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            last_inputs.write_text(json.dumps(dict(inputs), sort_keys=True), encoding="utf-8")
        numbers = [int(old.name.removeprefix("attempt-")) for old in folder.glob("attempt-*")]
        attempt = Attempt(number=max(numbers, default=0) + 1, folder=folder)
        shutil.rmtree(attempt.files, ignore_errors=True)
        for subfolder in (attempt.own, attempt.files, attempt.checkpoint):
            subfolder.mkdir(exist_ok=True)
        return attempt

    def commit(self, attempt: Attempt, manifest: dict[str, Any]) -> Artifact:
        """Digest the files, write the manifest last and exclusively, rename into the store, make files read-only.

        Raises:
            LostRaceError: Another process committed the same request with the same inputs first.
        """
        files = {
            str(path.relative_to(attempt.files)): {"sha256": file_digest(path), "size": path.stat().st_size}
            for path in sorted(attempt.files.rglob("*"))
            if path.is_file()
        }
        # The event file has times in it: it is kept and verified, but it does not shape what comes after.
        content = {name: file["sha256"] for name, file in files.items() if name != "events.jsonl"}
        manifest = {"schema": SCHEMA, **manifest, "attempts": attempt.number, "files": files}
        manifest["digest"] = fingerprint({"files": content})
        if self.find(manifest["stage"], manifest["fingerprint"], input_digests(manifest)).artifact is not None:
            raise LostRaceError(manifest["fingerprint"])
        for path in attempt.files.rglob("*"):
            if path.is_file():
                path.chmod(0o444)
        draft = attempt.own / "manifest.draft.json"
        write_json(draft, manifest)
        try:
            os.link(draft, attempt.folder / MANIFEST)  # atomic and exclusive: the first wins
        except FileExistsError:
            raise LostRaceError(manifest["fingerprint"]) from None
        draft.unlink()
        return self._publish(attempt.folder, manifest)

    def take_up(self, stage: str, name: str, fingerprint: str, *, inputs: Mapping[str, str]) -> Artifact | None:
        """Publish what a killed process had finished but not renamed (under the step's lock)."""
        folder = self.partial / self.address(stage, name, fingerprint)
        if not (folder / MANIFEST).exists():
            return None
        manifest = read_json(folder / MANIFEST)
        if input_digests(manifest) != dict(inputs) or self.damage(folder, manifest):
            return None
        return self._publish(folder, manifest)

    def place(self, manifest: Mapping[str, Any]) -> str:
        """`<stage>/<folder>` in the store."""
        return self.address(manifest["stage"], manifest["slug"], manifest["fingerprint"])

    def _publish(self, folder: Path, manifest: Mapping[str, Any]) -> Artifact:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        (folder / "inputs.json").unlink(missing_ok=True)
        target = self._free(self.root / self.place(manifest))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return self.fetch(target)

    def _free(self, folder: Path) -> Path:
        """`folder`, or the next of its numbered neighbours that nothing valid occupies; damage is moved aside."""
        target = folder
        for number in itertools.count(2):
            if not target.exists():
                break
            if self.damage(target, read_json(target / MANIFEST)):
                self._set_aside(target)
                break
            target = folder.with_name(f"{folder.name}-{number}")
        return target

    def _set_aside(self, folder: Path) -> None:
        """Move a damaged folder out of the store."""
        name = f"{folder.parent.name}-{folder.name}"
        places = (self.home / "damaged" / f"{name}-{count}" for count in itertools.count(1))
        place = next(path for path in places if not path.exists())
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)


def input_digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the inputs that an artifact was made from, by name."""
    return {name: origin["digest"] for name, origin in manifest["inputs"].items()}


def _manifest(folder: Path) -> dict[str, Any] | None:
    """A committed folder's manifest; None where gc took the folder after it was listed."""
    try:
        return read_json(folder / MANIFEST)
    except FileNotFoundError:
        return None


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        StoreTrouble: It is one of a home's own, and a newer Quench wrote it in a way that this one does not read.
    """
    value: Any = json.loads(path.read_text(encoding="utf-8"))
    if known := SCHEMAS.get(path.name):
        schema = value.get("schema", known)
        if isinstance(schema, int) and schema > known:
            raise StoreTrouble([_newer(path, schema, known)])
    return value


def _newer(path: Path, schema: int, known: int) -> Problem:
    return Problem(
        what=f"{path.name} has schema {schema}; this Quench reads schema {known}.",
        where=str(path),
        why="A newer Quench wrote it, and reading it by other rules could take one thing for another.",
        next="Use that newer Quench on this home, or set QUENCH_HOME to another folder.",
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys so that it is on disk, whole or not at all, when this returns."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)  # a full disk: what stood there stays
        raise


@contextlib.contextmanager
def flocked(
    path: Path, *, stop: threading.Event | None = None, waits: Callable[[], None] = lambda: None
) -> Generator[None]:
    """Hold an exclusive flock on `path`, waiting in steps of 50 ms so that a stop gets through.

    Args:
        path: The lock file.
        stop: Ends the waiting.
        waits: Is called once where somebody else has the lock.

    Raises:
        InterruptedError: `stop` was set while waiting.
    """
    with path.open("a") as file:
        reported = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop is not None and stop.is_set():
                    raise InterruptedError(f"stopped while waiting for {path.name}") from None
                if not reported:
                    waits()
                    reported = True
                time.sleep(0.05)
        yield


@contextlib.contextmanager
def locked_now(path: Path) -> Generator[bool]:
    """Hold an exclusive flock on `path` where it is free now; says whether it was."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
