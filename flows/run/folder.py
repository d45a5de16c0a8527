"""A run's folder: runs/<id>/ with its recipe, plan, preflight.json, registered.json, steps.json and report.*."""

from __future__ import annotations

import datetime as dt
import fcntl
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.compose import ArmSteps, Matrix
from flows.pins import Pins
from flows.plan.registered import REGISTERED
from flows.results.read import RunArm, StepRecord
from recipes.checks.python import named_python
from recipes.models.headers import read_headers
from recipes.problem import Problem
from recipes.read.load import Loaded
from recipes.schemes.engines import refusals
from recipes.schemes.ranks import ServedModel
from recipes.schemes.scheme import Scheme
from tasks.runtime.process.environments import versions
from tasks.runtime.step import External, Step, hardware
from tasks.runtime.store.local import locked_now, read_json, write_json

ALIVE = ".alive"  # locked by the process that works on the run
SHOWN_VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gptqmodel", "prefect", "mlflow")


def new_id(name: str) -> str:
    """Id of a new run. Its time is for readers: nothing is decided by the order of ids, so clocks may jump."""
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{name}-{secrets.token_hex(2)}"


class RunRecord:
    """Writes steps.json after every step, so that a killed run has its record too."""

    def __init__(
        self, home: Path, loaded: Loaded, *, id: str, flow_run: str | None = None, because: Sequence[str] = ()
    ) -> None:
        self.home = home
        self.id = id
        self.folder = home / "runs" / self.id
        self.folder.mkdir(parents=True)
        self._alive = (self.folder / ALIVE).open("w")  # as long as this process works on the run, or until `finish`
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._lock = threading.Lock()
        self._clock = time.monotonic()
        self._steps: dict[str, StepRecord] = {}
        self._serve = loaded.recipe.serve
        self._model = ServedModel(linears=())
        self._python = list(named_python(loaded))
        self._raw: dict[str, Any] = {
            "schema": 1,
            "id": self.id,
            "name": loaded.recipe.name,
            "recipe": str(loaded.path),
            "flow_run": flow_run,
            "because": list(because),
            "started_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "status": "running",
            "hardware": hardware(),
            "versions": versions(SHOWN_VERSIONS),
            "arms": [],
        }
        (self.folder / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
        write_json(self.folder / "recipe.resolved.json", loaded.recipe.model_dump(mode="json"))

    def pinned(self, pins: Pins, *, only: Sequence[str] = ()) -> None:
        """Note where base, data and external models came from, and which arms are wanted (none named: all)."""
        self._model = ServedModel.of(read_headers(pins.base.path))
        for source in filter(None, (pins.base, *pins.data, pins.adapter)):
            self._raw[source.name] = _origin(source)
        self._raw["code"] = self._code(pins)
        self._raw["external"] = {name: _origin(model) for name, model in pins.externals.items()}
        self._raw["only"] = list(only)
        self._write()

    def register(self, told: Mapping[str, Any]) -> None:
        """Write what the run can tell, before it is known what it tells; see flows/plan/registered.py."""
        write_json(self.folder / REGISTERED, dict(told))

    def _code(self, pins: Pins) -> list[dict[str, str | None]]:
        """Code that the recipe named and that somebody allowed, with the digest of what was read."""
        lines: list[dict[str, str | None]] = []
        for code in self._python:
            model = pins.externals[code.input] if code.is_model else None
            read = model or pins.scorers[code.input]
            source = model.source if model else code.written
            lines.append({"field": code.field, "source": source, "digest": read.digest, "allowed_by": code.allowed})
        return lines

    def add(self, step: Step, status: str, **more: Any) -> StepRecord:
        """Record what became of a step."""
        record = StepRecord(
            key=step.key, stage=step.stage, slug=step.slug, fingerprint=step.fingerprint, status=status, **more
        )
        with self._lock:
            self._steps[step.key] = record
        self._write()
        return record

    def composed(self, matrix: Matrix) -> None:
        """Record the arms and their reference, and put the steps into the order of the composition."""
        self._raw["reference"] = matrix.reference
        self._raw["arms"] = [self._arm(row) for row in matrix.arms]
        with self._lock:
            self._steps = {step.key: self._steps[step.key] for step in matrix.steps if step.key in self._steps}
        self._write()

    def _arm(self, row: ArmSteps) -> dict[str, Any]:
        refused = self._refused(row.arm.scheme)
        return asdict(RunArm.of_recipe(row.arm, row.keys, refused=refused, unserved=row.unserved))

    def _refused(self, scheme: Scheme | None) -> str | None:
        """Why serve.engine does not serve what this scheme makes (None: bf16); None where it does, or nobody asks."""
        engine = self._serve.engine
        if engine == "none":
            return None
        problems = refusals(scheme, self._model, engine=engine, tensor_parallel=self._serve.tensor_parallel)
        return problems[0].what if problems else None

    def finish(self, status: str) -> None:
        """completed, failed or stopped."""
        self._raw["status"] = status
        self._raw["finished_at"] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self._write()
        self._alive.close()

    @property
    def status(self) -> str:
        """running, completed, failed or stopped."""
        return self._raw["status"]

    @property
    def records(self) -> Mapping[str, StepRecord]:
        """Steps by key, as recorded so far."""
        return self._steps

    def publish(self) -> None:
        """Let runs/latest name this run."""
        link = self.folder.parent / f".latest-{self.id}"
        link.symlink_to(self.id)
        link.replace(self.folder.parent / "latest")

    def _write(self) -> None:
        with self._lock:
            steps = [asdict(record) for record in self._steps.values()]
            for step in steps:
                if step["node"] is None:
                    del step["node"]
            seconds = round(time.monotonic() - self._clock, 3)
            write_json(self.folder / "steps.json", {**self._raw, "seconds": seconds, "steps": steps})


def _origin(source: External) -> dict[str, str]:
    return {"path": str(source.path), "digest": source.digest, "source": source.source}


def is_under_way(folder: Path) -> bool:
    """True where a process works on the run now."""
    with locked_now(folder / ALIVE) as free:
        return not free


def run_files(home: Path, name: str) -> list[Path]:
    """The file of this name of every run that has it, oldest run first; `latest` is only another name of a run."""
    return sorted(path for path in (home / "runs").glob(f"*/{name}") if not path.parent.is_symlink())


def stop_dead(home: Path) -> list[Path]:
    """Let runs whose process was killed say that they were stopped; returns their folders."""
    stopped: list[Path] = []
    for path in run_files(home, "steps.json"):
        raw = read_json(path)
        if raw["status"] == "running" and not is_under_way(path.parent):
            write_json(path, {**raw, "status": "stopped"})
            stopped.append(path.parent)
    return stopped


def ended(home: Path) -> list[str]:
    """Ids of the flow runs that no process works on. Where Prefect's server was killed it still has them Running."""
    paths = run_files(home, "steps.json")
    return [id for path in paths if not is_under_way(path.parent) and (id := read_json(path).get("flow_run"))]


def find_run(home: Path, name: str | None) -> Path:
    """Folder of a run by id or unambiguous beginning; None is the latest.

    Raises:
        RecipeError: There is no such run, or more than one.
    """
    root = home / "runs"
    folders = sorted(root.iterdir()) if root.is_dir() else []
    matches = [root / "latest"] if name is None else [folder for folder in folders if folder.name.startswith(name)]
    matches = [folder for folder in matches if (folder / "steps.json").exists()]
    if len(matches) == 1:
        return matches[0].resolve()
    names = sorted(folder.name for folder in root.glob("*/") if folder.name != "latest")
    raise Problem(
        what=f"{len(matches)} runs are called {name!r}" if name else "there is no run yet",
        where=str(root),
        why="a report belongs to one run",
        next=f"name one of: {', '.join(names[-5:])}" if names else "quench run RECIPE",
    ).error()
