"""The store: find / begin / commit / fetch / lock. Addressed by what was asked, verified by what came out.

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
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.problem import RecipeError
from tasks.runtime.fingerprint import difference, file_digest, fingerprint
from tasks.runtime.store.home import check_layout

MANIFEST = "manifest.json"
SCHEMA = 1
PRINT = re.compile(r"-([0-9a-f]{12})(?=-|$)")  # in the name of a folder; a slug may look like one


def find_home(start: Path | None = None) -> Path:
    """QUENCH_HOME, else the nearest `.quench` from the current folder upwards, else `.quench` here.

    Raises:
        RecipeError: Another layout stands in it than this Quench reads.
    """
    here = (start or Path.cwd()).resolve()
    if named := os.environ.get("QUENCH_HOME"):
        home = Path(named).expanduser().resolve()
    else:
        found = (folder / ".quench" for folder in (here, *here.parents))
        home = next((folder for folder in found if folder.is_dir()), here / ".quench")
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
        away: It is finished, but not here in full: digests are known, `Store.bring` gets the files. Only stores with
            something behind them know this.
    """

    artifact: Artifact | None
    why: str
    away: Artifact | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at making a step, in its partial folder."""

    number: int
    folder: Path

    @property
    def own(self) -> Path:
        """attempt-N/: job.json, log.txt, result.json."""
        return self.folder / f"attempt-{self.number}"

    @property
    def files(self) -> Path:
        """What the job writes; empty at the start."""
        return self.folder / "files"

    @property
    def checkpoint(self) -> Path:
        """Kept over attempts of the same inputs; gone at commit."""
        return self.folder / "checkpoint"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A stage's committed folders, oldest name first: by any 12 digits in their names, and by what is before."""

    by_fingerprint: dict[str, list[str]]
    by_name: dict[str, list[str]]


class LostRaceError(Exception):
    """Somebody else committed the same step first; take theirs."""


class StoreTrouble(RecipeError):
    """What lies behind a home, a bucket, does not do what it was asked for; what is finished here is kept."""


class Store:
    """Artifacts on a local file system."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "store"
        self.partial = home / "partial"
        self._listed: dict[str, Listing] | None = None

    def snapshot(self) -> Store:
        """A view that lists each stage once, for a plan; who makes something has to see what others made meanwhile."""
        view = copy.copy(self)
        view._listed = {}
        return view

    def check(self) -> None:
        """Raise RecipeError where what lies behind this home cannot be used; here nothing does."""

    def bring(self, found: Lookup) -> Artifact | None:
        """What was found, with its files here; None where it has to be made."""
        return found.artifact

    def download_bytes(self, found: Lookup) -> int:
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
            there = {name: one["digest"] for name, one in manifest["inputs"].items()}
            if there != dict(inputs):
                changed = [name for name in inputs if there.get(name) != inputs[name]]
                why = f"input was remade: {', '.join(changed) or 'fewer inputs'}"
                continue
            if damage := self.damage(folder, manifest):
                why = f"damaged: {damage}"
                continue
            return Lookup(artifact=self.fetch(folder, manifest), why="hit")
        return Lookup(artifact=None, why=why)

    def _listing(self, stage: str, part: str) -> Listing:
        """Folders with `part` in their names; in a view of one moment all of them, once."""
        if self._listed is not None:
            if stage in self._listed:
                return self._listed[stage]
            part = ""
        folder, found = self.root / stage, Listing(by_fingerprint={}, by_name={})
        for entry in sorted(one.name for one in os.scandir(folder) if part in one.name) if folder.is_dir() else ():
            for one in PRINT.finditer(entry) if not entry.startswith(".") else ():
                found.by_fingerprint.setdefault(one[1], []).append(entry)
                found.by_name.setdefault(entry[: one.start()], []).append(entry)
        if self._listed is not None:
            self._listed[stage] = found
        return found

    def fetch(self, folder: Path, manifest: Mapping[str, Any] | None = None) -> Artifact:
        """The artifact in a committed folder. A choice stands for the artifact that it names."""
        made: Mapping[str, Any] = manifest or read_json(folder / MANIFEST)
        path, digest = folder / "files", made["digest"]
        if made["stage"] == "choose":
            chosen = made["inputs"][read_json(path / "choice.json")["candidate"]]
            path, digest = self.home / chosen["path"], chosen["digest"]
        return Artifact(fingerprint=made["fingerprint"], digest=digest, path=path, folder=folder)

    def damage(self, folder: Path, manifest: Mapping[str, Any], *, digests: bool = False) -> str | None:
        """What is wrong with a committed folder's files, or None. Sizes always, sha256 on request."""
        for name, one in manifest["files"].items():
            path = folder / "files" / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != one["size"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {one['size']}"
            if digests and file_digest(path) != one["sha256"]:
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
            say: Is told once where another run has the lock.

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
        made_for = folder / "inputs.json"
        if not made_for.exists() or read_json(made_for) != dict(inputs):
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            made_for.write_text(json.dumps(dict(inputs), sort_keys=True), encoding="utf-8")
        numbers = [int(old.name.removeprefix("attempt-")) for old in folder.glob("attempt-*")]
        attempt = Attempt(number=max(numbers, default=0) + 1, folder=folder)
        shutil.rmtree(attempt.files, ignore_errors=True)
        for made in (attempt.own, attempt.files, attempt.checkpoint):
            made.mkdir(exist_ok=True)
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
        content = {name: one["sha256"] for name, one in files.items() if name != "events.jsonl"}
        manifest = {"schema": SCHEMA, **manifest, "attempts": attempt.number, "files": files}
        manifest["digest"] = fingerprint({"files": content})
        inputs = {name: one["digest"] for name, one in manifest["inputs"].items()}
        if self.find(manifest["stage"], manifest["fingerprint"], inputs).artifact is not None:
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
        there = {name: one["digest"] for name, one in manifest["inputs"].items()}
        if there != dict(inputs) or self.damage(folder, manifest):
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

    def _free(self, wanted: Path) -> Path:
        """`wanted`, or the next of its numbered neighbours that nothing valid occupies; damage is moved aside."""
        number = 1
        target = wanted
        while target.exists():
            if self.damage(target, read_json(target / MANIFEST)):
                name = f"{target.parent.name}-{target.name}"
                aside = (self.home / "damaged" / f"{name}-{count}" for count in itertools.count(1))
                place = next(path for path in aside if not path.exists())
                place.parent.mkdir(parents=True, exist_ok=True)
                target.rename(place)
                break
            number += 1
            target = wanted.with_name(f"{wanted.name}-{number}")
        return target


def _manifest(folder: Path) -> dict[str, Any] | None:
    """A committed folder's manifest; None where gc took the folder after it was listed."""
    try:
        return read_json(folder / MANIFEST)
    except FileNotFoundError:
        return None


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


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
        waits: Is called once where the lock is not free at once.

    Raises:
        InterruptedError: `stop` was set while waiting.
    """
    with path.open("a") as file:
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop is not None and stop.is_set():
                    raise InterruptedError(f"stopped while waiting for {path.name}") from None
                if not said:
                    waits()
                    said = True
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
