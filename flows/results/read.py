"""What a run left behind: steps.json and the manifests of its artifacts, read once and typed.

The report is a function of this and of nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from recipes.arms import TRAINED, Arm
from recipes.problem import Problem
from recipes.schema import Recipe, recipe_of_run
from recipes.schemes.scheme import Scheme
from tasks.runtime.store.local import read_json

REFERENCE = TRAINED  # where the recipe names no other

Role = Literal["base", "reference", "merged", "scheme", "on-base", "control", "kv-cache", "null", "external"]


class SchemeParts(NamedTuple):
    """What a scheme's slug says."""

    method: str
    bits: int
    group_size: int


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What became of one step, as steps.json has it.

    Attributes:
        status: hit, made, failed, or skipped (an input failed).
        path: The committed folder relative to QUENCH_HOME, or None.
        seconds: Of the child in this run; a hit took none.
        node: Of a Ray cluster, where it was made or found: host, address, id; None where it ran on the flow's machine.
    """

    key: str
    stage: str
    slug: str
    fingerprint: str
    status: str
    path: str | None = None
    problem: Mapping[str, str] | None = None
    log: str | None = None
    seconds: float = 0.0
    node: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class RunStep(StepRecord):
    """One step of a run that was read, with the artifact that it found or made.

    Attributes:
        files: The artifact's files, absolute, or None.
        manifest: None where there is no artifact, or none any more.
    """

    files: Path | None
    manifest: Mapping[str, Any] | None

    @property
    def ok(self) -> bool:
        """There is an artifact, and its manifest is still in the store."""
        return self.status in ("hit", "made") and self.manifest is not None

    @property
    def problems(self) -> dict[str, str]:
        """Metric -> why an evaluate step has no scores of it, in one sentence; empty where it has all."""
        problems = (self.manifest or {}).get("result", {}).get("problems", {})
        return {metric: _sentence(problem) for metric, problem in problems.items()}

    @property
    def trouble(self) -> str:
        """Why there is no artifact, in one sentence."""
        if self.problem:
            return f"{self.key}: {_sentence(self.problem)}"
        if self.status in ("hit", "made"):
            return f"{self.key} is not in the store any more"
        return f"{self.key} {self.status}"


def _sentence(problem: Mapping[str, str]) -> str:
    return f"{problem['what'].rstrip('.')} ({problem['why'].rstrip('.')})"


@dataclass(frozen=True, kw_only=True)
class RunArm:
    """One arm of a run and the keys of the steps behind it: a line of steps.json, its keys in this order.

    Attributes:
        merge_base: `dequantized`, `original`, None where nothing is merged; `auto` where the run ended undecided.
        scheme: Slug of its scheme.
        quantization: The scheme's params(): method, bits, group_size (-1: per channel) and so on.
        calibration: `domain`, the run's own set; `generic`, `mixed` and `random` are controls.
        kv: How its KV cache is stored (simulated): `fp8`, `fp8-calibrated`, `int8`; None for bf16.
        null: What is other about its computing, of a null arm: `batch`, `threads`, `attention`.
        of: Slug of the arm whose files it loads, where it differs from that arm in its KV cache or its computing alone.
        external: A model that this pipeline did not make.
        unavailable: Why this arm could not be, known before the run; it has no steps then.
        refused: Why the recipe's serve.engine does not read it; None where it does, or the recipe names none.
        serve: Key of the step that served it with that engine; None where there is none.
        unserved: Why there is none, where the recipe names an engine.
    """

    slug: str
    kind: str
    merge_base: str | None
    scheme: str | None
    quantization: Mapping[str, Any] | None
    on_base: bool
    calibration: str = "domain"
    scales_from_base: bool = False
    model: str | None
    adapter: str | None
    kv: str | None = None
    null: str | None = None
    of: str | None = None
    external: bool = False
    unavailable: str | None = None
    evaluate: str | None
    measure: str | None
    refused: str | None = None
    serve: str | None = None
    unserved: str | None = None

    @classmethod
    def of_recipe(
        cls, arm: Arm, keys: Mapping[str, str | None], *, refused: str | None, unserved: str | None = None
    ) -> RunArm:
        """An arm that a recipe wants, with the keys of the steps that make, score, time and serve it."""
        quantized = {"scheme": arm.scheme and arm.scheme.slug, "quantization": arm.scheme and arm.scheme.params()}
        return cls(**{**vars(arm), **quantized, **keys, "refused": refused, "unserved": unserved})

    @property
    def role(self) -> Role:
        """What it is there for: the page draws what can be shipped, and keeps controls to their own section."""
        held: dict[Role, bool] = {
            "external": self.external,
            "null": self.null is not None,
            "control": self.is_control,
            "kv-cache": self.kv is not None,
            "on-base": self.on_base,
            "scheme": self.scheme is not None,
            "merged": self.merge_base is not None,
            "reference": self.adapter is not None,
        }
        roles: list[Role] = [role for role, holds in held.items() if holds]
        return roles[0] if roles else "base"

    @property
    def is_control(self) -> bool:
        """Made to be compared with, not to be shipped."""
        return self.calibration != "domain" or self.scales_from_base

    @property
    def parts(self) -> SchemeParts:
        """Method, bits and group size of the scheme; zeros where there is none."""
        params = self.quantization
        return SchemeParts(params["method"], params["bits"], params["group_size"]) if params else SchemeParts("", 0, 0)

    @property
    def quantizer(self) -> Scheme | None:
        """The scheme itself; None where nothing is quantized but the base, to NF4."""
        return Scheme.of(dict(self.quantization), slug=self.scheme or self.slug) if self.quantization else None

    @property
    def unfit(self) -> str | None:
        """Why it is nothing to promote, whatever its scores."""
        if self.refused:
            return f"the engine of the recipe does not serve it: {self.refused}"
        if self.unavailable:
            return self.unavailable
        if self.is_control:
            return "it is a control, made to be compared with"
        if self.external:
            return "this run did not make it"
        if self.null:
            return f"it is {self.of}, computed in another way to show noise of arithmetic"
        if self.kv:
            return f"its files are those of {self.of}; the KV cache is a setting of the server"
        if self.adapter is not None:
            return "an adapter on top of its base is not one artifact; merge it"
        return "the untouched base is nothing to promote" if self.model is None else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, read."""

    folder: Path
    home: Path
    raw: Mapping[str, Any]
    recipe: Mapping[str, Any]
    predicted: Mapping[str, Mapping[str, float | None]]
    steps: Mapping[str, RunStep]
    arms: tuple[RunArm, ...]

    @property
    def base(self) -> Path | None:
        """The untouched base model's folder, or None where it has gone."""
        return _folder(self.raw.get("base"))

    def external(self, slug: str) -> Path | None:
        """The folder of an external model, or None where it has gone."""
        return _folder((self.raw.get("external") or {}).get(slug))

    @property
    def reference(self) -> str | None:
        """Slug of what KL and agreement are measured against; None for a run that has no reference."""
        return self.raw.get("reference", REFERENCE)  # older runs do not say

    def arm(self, slug: str) -> RunArm | None:
        """An arm by slug; None where the run has none of this name."""
        return next((arm for arm in self.arms if arm.slug == slug), None)

    def step(self, key: str | None) -> RunStep | None:
        """A step by key; None where the run never came to it."""
        return self.steps.get(key) if key else None

    @property
    def choice(self) -> Mapping[str, Any] | None:
        """What the choose step said (tasks/jobs/choose.py); None where it was not made."""
        return _choice(self.steps.values())


def read_run(folder: Path, home: Path) -> Run:
    """Read a run's folder and the manifests of all its steps."""
    raw = read_json(folder / "steps.json")
    preflight = folder / "preflight.json"
    recipe = folder / "recipe.resolved.json"
    steps = {record["key"]: _step(record, home) for record in raw["steps"]}
    chosen = (_choice(steps.values()) or {}).get("candidate", "auto")
    return Run(
        folder=folder,
        home=home,
        raw=raw,
        recipe=read_json(recipe) if recipe.exists() else {},
        predicted=read_json(preflight).get("steps", {}) if preflight.exists() else {},
        steps=steps,
        arms=tuple(_arm(record, chosen) for record in raw["arms"]),
    )


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        RecipeError: It is one of another version of Quench.
    """
    path = run / "recipe.resolved.json"
    try:
        return recipe_of_run(read_json(path))
    except ValidationError as error:
        raise Problem(
            what="The run's recipe is one of another version of Quench.",
            where=str(path),
            why=f"{error.error_count()} fields of it are unknown or have other values now.",
            next="quench run the recipe again; what has not changed is taken from the store.",
        ).error() from None


def _choice(steps: Iterable[RunStep]) -> Mapping[str, Any] | None:
    return next((step.manifest["result"] for step in steps if step.stage == "choose" and step.manifest), None)


def _known(kind: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that a line of steps.json has: older runs say less."""
    return {field.name: raw[field.name] for field in fields(kind) if field.name in raw}


def _arm(raw: Mapping[str, Any], chosen: str) -> RunArm:
    """An arm; where the recipe left the merge base to the run, with the one that was chosen."""
    arm = RunArm(**_known(RunArm, raw))
    return replace(arm, merge_base=chosen) if arm.merge_base == "auto" else arm


def _step(raw: Mapping[str, Any], home: Path) -> RunStep:
    record = _known(StepRecord, raw)
    folder = home / record["path"] if record["path"] else None
    if folder is None or not (folder / "manifest.json").is_file():
        return RunStep(**record, files=None, manifest=None)
    return RunStep(**record, files=folder / "files", manifest=read_json(folder / "manifest.json"))


def _folder(origin: Mapping[str, str] | None) -> Path | None:
    path = Path(origin["path"]) if origin else None
    return path if path is not None and path.is_dir() else None


class Note(NamedTuple):
    """A decision or fallback that a job recorded."""

    step: str
    about: str
    text: str


def notes(steps: Sequence[RunStep]) -> Iterator[Note]:
    """Notes of all artifacts of the run, in the order of the steps; equal ones of one stage once."""
    seen: set[tuple[str, str, str]] = set()
    for step in steps:
        path = step.files / "events.jsonl" if step.files else None
        if path is None or not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line) if line.endswith("}") else {}
            mark = (step.stage, str(event.get("about")), str(event.get("text")))
            if event.get("kind") == "note" and mark not in seen:
                seen.add(mark)
                yield Note(step.key, event["about"], event["text"])
