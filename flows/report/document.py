"""report.json as types: its sections in their order, which is that of the file. docs/report.md says what each means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class About(TypedDict):
    """The run itself."""

    schema_version: int
    id: str | None
    name: str | None
    status: str | None
    started_at: str | None
    finished_at: str | None


class AnswerJson(TypedDict):
    """One question, its short answer, and all of it."""

    question: str
    short: str
    text: list[str]


class Words(TypedDict):
    """What the figures say, in sentences."""

    verdict: list[str]
    answers: list[AnswerJson]


class Source(TypedDict):
    """Where something came from, without its path on this machine."""

    source: str | None
    digest: str | None


class KvCache(TypedDict):
    """A KV cache that is not stored in bf16, and the arm whose files are loaded."""

    kind: str
    of: str | None
    label: str


class ArmJson(TypedDict):
    """One arm with its cells; paths are relative to QUENCH_HOME."""

    status: str
    ranked: bool
    role: str
    refused: str | None
    external: Source | None
    merge_base: str | None
    kv_cache: KvCache | None
    path: str | None
    adapter_path: str | None
    metrics: dict[str, Any]


class ArmSection(TypedDict):
    """The arms, and how it came to them."""

    arms: dict[str, ArmJson]
    not_ranked: dict[str, str]
    reference: str | None
    only: list[str]
    because: list[str]
    choice: dict[str, Any] | None
    error_over_delta: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None
    domains: dict[str, dict[str, Any]]


class FamilyJson(TypedDict):
    """A family of comparisons and how many it has in this run."""

    name: str
    question: str
    size: int


class Differences(TypedDict):
    """What was compared with what."""

    comparisons: list[dict[str, Any]]
    comparisons_left_out: list[dict[str, Any]]
    families: list[FamilyJson]
    waterfall: dict[str, Any] | None
    power: list[dict[str, Any]]


class Gains(TypedDict):
    """What arms keep of the gain of fine-tuning; None where the run has no base, no nf4-adapter or no such arm."""

    kept: dict[str, Any] | None


class Nulls(TypedDict):
    """Noise of arithmetic; only of runs with null arms, where each comparison has `noise`, too."""

    nulls: NotRequired[dict[str, Any]]


class SplitSize(TypedDict):
    """What the figures of a split rest on."""

    rows: int
    groups: int
    tokens: int


class ScorerJson(TypedDict):
    """A scorer of the recipe and the metric that it gives."""

    metric: str
    kind: str


class SpeedJson(TypedDict):
    """What the speed of an arm was measured with, and whether that says anything about serving."""

    kernel: str | None
    serving_kernel: bool | None
    device: str | None
    threads: int | None
    batch: int | None
    context: int | None
    label: str | None


class Reading(TypedDict):
    """How the figures are to be read, and what they rest on."""

    directions: dict[str, str]
    meanings: dict[str, str]
    method: dict[str, str]
    data: dict[str, SplitSize]
    scorer: str | None
    scorers: list[ScorerJson]
    speed: dict[str, SpeedJson]
    layers: dict[str, Any]


class Served(TypedDict):
    """What a real engine gave; only where the run served an arm, or says why it did not."""

    served: NotRequired[ServedJson]


class ServedJson(TypedDict):
    """Served arms beside what was measured, the floor, and what was not served; docs/report-json.md has the fields."""

    limits: dict[str, float]
    floor: FloorJson
    arms: dict[str, ServedArmJson]
    not_served: dict[str, str]
    text: list[str]


class FloorJson(TypedDict):
    """The arm that the others are judged beside, or why there is none."""

    arm: str | None
    reason: str | None


class ServedArmJson(TypedDict):
    """One arm in the engine."""

    step: str
    verdict: str
    checks: list[dict[str, Any]]
    metrics: dict[str, Any]
    own: dict[str, float | None]
    differences: dict[str, dict[str, Any]]
    engine: str
    version: str
    device: str
    kernel: str | None
    start_s: float | None
    resident_gib: float | None
    kv_cache_dtype: str | None
    command: list[str]
    loads: list[dict[str, Any]]
    rank: int | None


class Shipping(TypedDict):
    """What can be promoted, what fits where, what the arms answer, and how they are loaded."""

    gate: dict[str, Any]
    registered: dict[str, Any] | None
    fit: dict[str, Any]
    samples: dict[str, Any] | None
    loading: dict[str, Any]


class Dev(TypedDict):
    """Figures of dev, for tuning; None where no arm has scores of it."""

    dev: dict[str, Any] | None


class StepMemory(TypedDict):
    """Memory of a step as it was predicted and measured; None where nothing was."""

    step: str
    predicted_host_gib: float | None
    measured_host_gib: float | None
    predicted_gpu_gib: float | None
    measured_gpu_gib: float | None


class StepJson(TypedDict):
    """One step with its artifact; `node` only where it ran on a Ray cluster."""

    key: str
    status: str
    path: str | None
    fingerprint: str
    digest: str | None
    seconds: float | None
    attempts: int | None
    finished_at: str | None
    execution: dict[str, Any] | None
    node: NotRequired[Mapping[str, str]]


class Failure(TypedDict):
    """A step that has no artifact, or scores that an evaluate step could not give; with the arms that lack it."""

    step: str
    status: str
    problem: dict[str, str] | None
    why: str
    log: str | None
    arms: list[str]


class Making(TypedDict):
    """Time, memory, machine and origin."""

    seconds: dict[str, float]
    wall_seconds: float | None
    memory: list[StepMemory]
    hardware: dict[str, Any]
    versions: dict[str, str]
    sources: dict[str, Source]
    code: list[dict[str, Any]]
    steps: list[StepJson]
    failures: list[Failure]
    notes: list[dict[str, str]]


class Document(About, Words, ArmSection, Differences, Gains, Nulls, Reading, Served, Shipping, Dev, Making):
    """All of report.json."""
