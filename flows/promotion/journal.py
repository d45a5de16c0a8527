"""promotions.jsonl: every decision about what ships, one line each, appended before the registry hears of it.

The file is the truth and the registry a view of it. A line is written under one lock. One that a killed process left
without its end is skipped by readers and cut off by the next writer.

A version is a model name and an artifact: the same bytes are the same version, however often they are judged.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from flows.reach import JOURNAL, records
from tasks.runtime.store.local import flocked

Event = Literal["promoted", "blocked", "rolled back"]
MOVES = ("promoted", "rolled back")  # events after which the version is champion
EVENTS = ("blocked", *MOVES)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One decision.

    Attributes:
        at: ISO time, UTC.
        model: Name in the registry.
        version: Counted per model, from 1.
        event: `blocked` leaves the champion as it is.
        outcome: The gate's: pass, worse, undecided, not served as measured; of a rollback `none`.
        run: Run that made the artifact.
        arm: Its arm there.
        kind: How it is loaded: bf16 or quantized.
        path: The artifact's folder, relative to QUENCH_HOME.
        digest: sha256 of its content.
        recipe: sha256 of the resolved recipe.
        dataset: sha256 of the dataset; None where it is not known.
        champion: Version that was champion until then; None for the first.
        checks: The gate's checks as report.json has them.
        served: What the engine made of it, in a sentence; None where the run served nothing.
        test: Names the rows of test that it was judged on (flows/promotion/evidence.py); None after a rollback, and
            in lines of an older Quench.
        look: Which candidate it was on these rows; None as above.
        scoring: Digest of the scorers that it was judged by; None in lines of an older Quench.
    """

    at: str
    model: str
    version: int
    event: Event
    outcome: str
    run: str
    arm: str
    kind: str
    path: str
    digest: str
    recipe: str
    dataset: str | None
    champion: int | None
    checks: list[dict[str, Any]] = field(default_factory=list)
    served: str | None = None
    test: str | None = None
    look: int | None = None
    scoring: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Promotion | None:
        """From a line of promotions.jsonl; None where it lacks a field or has an event of a newer Quench.

        Fields of a newer Quench are not read.
        """
        known = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        needed = {field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING}
        return cls(**known) if needed <= known.keys() and known["event"] in EVENTS else None


def now() -> str:
    """ISO time of now, UTC, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def locked(home: Path) -> Generator[None]:
    """Hold the lock of all decisions: of two promotions at once the second sees what the first one did."""
    (home / "locks").mkdir(parents=True, exist_ok=True)
    with flocked(home / "locks" / "promotions.lock"):
        yield


def models(home: Path) -> list[str]:
    """Every model name that something was decided about, sorted."""
    named = (record.get("model") for record in records(home / JOURNAL))
    return sorted({name for name in named if isinstance(name, str)})


def with_champion(home: Path) -> list[str]:
    """Those of `models` that have a champion."""
    return [model for model in models(home) if champion(Journal(home, model).lines())]


class Journal:
    """The decisions about one model."""

    def __init__(self, home: Path, model: str) -> None:
        self.path = home / JOURNAL
        self.model = model

    def lines(self) -> list[Promotion]:
        """Every decision about this model that can be read, oldest first."""
        return [line for line in self._read() if line is not None]

    def unread(self) -> int:
        """Lines about this model that another version of Quench wrote and this one cannot read: not in `lines`."""
        return sum(line is None for line in self._read())

    def highest(self) -> int:
        """The highest number that a version of this model has, also in a line that lacks a field."""
        known = (record.get("version") for record in records(self.path) if record.get("model") == self.model)
        return max((number for number in known if isinstance(number, int)), default=0)

    def _read(self) -> list[Promotion | None]:
        return [Promotion.of(record) for record in records(self.path) if record.get("model") == self.model]

    def append(self, promotion: Promotion) -> None:
        """Write a decision so that it is on disk when this returns. Only under `locked`."""
        line = json.dumps(asdict(promotion), sort_keys=True, ensure_ascii=False) + "\n"
        with self.path.open("ab+") as file:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def champion(lines: Sequence[Promotion]) -> Promotion | None:
    """The decision that made the present champion one."""
    return next((line for line in reversed(lines) if line.event in MOVES), None)


def challenger(lines: Sequence[Promotion]) -> Promotion | None:
    """What was judged last, where it did not become champion."""
    last = next((line for line in reversed(lines) if line.event != "rolled back"), None)
    return last if last is not None and last.event == "blocked" else None


def versions(lines: Sequence[Promotion]) -> dict[int, Promotion]:
    """Version -> the decision that counts: its promotion where it had one, else the latest verdict."""
    decisive: dict[int, Promotion] = {}
    for line in lines:
        before = decisive.get(line.version)
        if line.event == "promoted" or (line.event == "blocked" and (before is None or before.event == "blocked")):
            decisive[line.version] = line
    return decisive


def version_of(lines: Sequence[Promotion], digest: str, *, highest: int = 0) -> int:
    """The version of an artifact: the one that it has, or the next after `highest` and all of these."""
    known = {line.digest: line.version for line in lines}
    return known.get(digest) or max([highest, *known.values()]) + 1
