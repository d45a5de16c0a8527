"""The JSON contract between a step's parent and its child: job.json in, result.json out.

A job body is `run(job: Job) -> dict`; what it returns stands in the manifest as `result`. Bodies read
`job.inputs`, write below `job.out` and nowhere else (`job.checkpoint` survives a kill; only train uses it).
Copy job.json to any machine with the same folders and run it there:
`python -P -m tasks.runtime.process.child run job.json`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tasks.runtime.process.errors import StageError
from tasks.runtime.process.events import Events

SCHEMA = 1
ENTRY = ("-P", "-m", "tasks.runtime.process.child")  # behind the interpreter, on the command line of every child


@dataclass(frozen=True, kw_only=True)
class Input:
    """One artifact that a job reads: a file or a folder, never written to."""

    path: Path
    digest: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how a job runs; never part of its identity.

    Attributes:
        device: `cpu` or `cuda`.
        kind: `cpu`, or the kind of the leased GPU: what sums depend on.
        threads: Threads the child may use: the size of its lease.
        micro_batch: Rows per forward pass in training; None lets the job take the whole batch.
        processes: Ranks that do the job together, started by `accelerate launch`; this is 1 for all but train.
        launcher: Configuration of the launch: infra/accelerate/LAUNCHER.yaml.
        log_level: Level of the child's own loggers.
        server_python: Interpreter of the environment from which the job starts an engine's server; None for all but
            serve.
    """

    device: str = "cpu"
    kind: str = "cpu"
    threads: int = 1
    micro_batch: int | None = None
    processes: int = 1
    launcher: str = "ddp"
    log_level: str = "INFO"
    server_python: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one child is asked to make."""

    stage: str
    slug: str
    fingerprint: str
    entry: str
    params: dict[str, Any]
    inputs: dict[str, Input]
    out: Path
    checkpoint: Path
    execution: Execution = field(default_factory=Execution)
    schema: int = SCHEMA

    @property
    def rank(self) -> int:
        """Place among `execution.processes`, as `accelerate launch` sets it. Rank 0 alone writes files."""
        return int(os.environ.get("RANK", "0")) if self.execution.processes > 1 else 0

    @property
    def events(self) -> Events:
        """The artifact's event file; other ranks than 0 say nothing."""
        return Events(self.out / "events.jsonl", silent=self.rank > 0)

    def optional(self, name: str) -> Path | None:
        """The path of an input that may be absent."""
        return self.inputs[name].path if name in self.inputs else None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file below `out`; keys are sorted, so that equal values are equal bytes."""
        (self.out / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def dump(self, path: Path) -> None:
        """Write job.json."""
        path.write_text(json.dumps(asdict(self), default=str, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read job.json. Fields of `execution` that a newer Quench has are not read.

        Raises:
            StageError: It was written for another schema.
        """
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise StageError.of(
                what=f"This job has schema {raw['schema']}; this Quench reads schema {SCHEMA}.",
                where=str(path),
                why="Another version of Quench wrote it.",
                next="Use that version, or quench run the recipe again.",
            )
        known = {field.name for field in fields(Execution)}
        inputs = {
            name: Input(path=Path(origin["path"]), digest=origin["digest"], fingerprint=origin["fingerprint"])
            for name, origin in raw["inputs"].items()
        }
        return cls(
            stage=raw["stage"],
            slug=raw["slug"],
            fingerprint=raw["fingerprint"],
            entry=raw["entry"],
            params=raw["params"],
            inputs=inputs,
            out=Path(raw["out"]),
            checkpoint=Path(raw["checkpoint"]),
            execution=Execution(**{name: value for name, value in raw["execution"].items() if name in known}),
        )
