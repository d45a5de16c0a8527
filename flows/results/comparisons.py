"""Which arms are compared on what: families written down before any result is seen, and nothing else is compared.

A family answers one question. Its intervals hold together at 95 %, so the words better, worse and no difference shown
may be read side by side. Arms that a run does not have are skipped; a comparison that cannot be made is listed with
its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flows.results.flips import flips_json
from flows.results.metrics import METRICS, TASK, is_task
from flows.results.paired import OTHER_DEVICE, Draw, Obstacle, Paired, differences, paired, why_not
from flows.results.read import REFERENCE, RunArm, SchemeParts
from flows.results.rows import RowScores
from flows.results.stats import Interval

Verdict = Literal["better", "worse", "no difference shown"]
_METHODS = ("rtn", "awq", "gptq")  # of two schemes the one that comes first here is a


class Pair(NamedTuple):
    """Two arms and the metric they are compared on."""

    a: str
    b: str
    metric: str


Pairs = Callable[[Sequence[RunArm]], Iterator[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One question and all comparisons that answer it.

    Attributes:
        every_task: Compares on the scores of all scorers, not of the first alone.
    """

    name: str
    question: str
    members: tuple[tuple[Pairs, tuple[str, ...]], ...]
    every_task: bool = False

    def pairs(self, arms: Sequence[RunArm], tasks: Sequence[str] = ()) -> list[Pair]:
        """Every comparison of this family among these arms; `tasks` are the scores of further scorers."""
        return [
            Pair(a, b, metric)
            for pairs, metrics in self.members
            for a, b in pairs(arms)
            for metric in (*metrics, *(tasks if self.every_task else ()))
        ]


def _named(a: str, b: str) -> Pairs:
    def pairs(arms: Sequence[RunArm]) -> Iterator[tuple[str, str]]:
        if {a, b} <= {arm.slug for arm in arms}:
            yield a, b

    return pairs


def merged_schemes(arms: Sequence[RunArm]) -> list[RunArm]:
    """Every scheme on the merged model, without controls and with its KV cache in bf16."""
    return [arm for arm in arms if arm.scheme and not arm.on_base and not arm.is_control and arm.kv is None]


def _against_merge(arms: Sequence[RunArm]) -> Iterator[tuple[str, str]]:
    """Every scheme against the merged model that it was made from."""
    for arm in merged_schemes(arms):
        yield arm.slug, f"merged-{arm.merge_base}"


def _against_each_other(arms: Sequence[RunArm]) -> Iterator[tuple[str, str]]:
    """All pairs of schemes, the plainer method first, then fewer bits, then wider groups."""
    ordered = sorted(merged_schemes(arms), key=_plainness)
    for index, arm in enumerate(ordered):
        for other in ordered[index + 1 :]:
            yield arm.slug, other.slug


def _plainness(arm: RunArm) -> tuple[int, int, int, str]:
    method, bits, group = arm.parts
    return (_METHODS.index(method) if method in _METHODS else len(_METHODS), bits, -group, arm.slug)


def _against_on_base(arms: Sequence[RunArm]) -> Iterator[tuple[str, str]]:
    """Every scheme on the merged model against the same scheme on the base with the adapter on top."""
    merged = {arm.slug for arm in merged_schemes(arms)}
    for arm in arms:
        if arm.on_base and arm.kv is None and arm.scheme in merged:
            yield arm.scheme, arm.slug


def _against_controls(arms: Sequence[RunArm]) -> Iterator[tuple[str, str]]:
    """Every scheme that has controls against each of them, and against rounding with the same bits and groups."""
    for arm in merged_schemes(arms):
        controls = [other.slug for other in arms if other.is_control and other.kv is None and other.scheme == arm.slug]
        if controls:
            same = SchemeParts("rtn", arm.parts.bits, arm.parts.group_size)
            controls += [other.slug for other in merged_schemes(arms) if other.parts == same]
        yield from ((arm.slug, control) for control in controls)


def _against_external(arms: Sequence[RunArm]) -> Iterator[tuple[str, str]]:
    """Every external model against the merged model that is quantized; the base where this run merged nothing."""
    slugs = {arm.slug for arm in arms}
    chosen = [f"merged-{arm.merge_base}" for arm in merged_schemes(arms)]
    ours = next((slug for slug in (*chosen, "merged-dequantized", "merged-original", "base") if slug in slugs), None)
    if ours is not None:
        yield from ((arm.slug, ours) for arm in arms if arm.external)


def _against_bf16_cache(arms: Sequence[RunArm]) -> Iterator[tuple[str, str]]:
    """Every arm with a quantized KV cache against the arm that it comes from."""
    for arm in arms:
        if arm.kv is not None and arm.of is not None:
            yield arm.slug, arm.of


FAMILIES: tuple[Family, ...] = (
    Family(
        name="fine-tuning",
        question="How much did fine-tuning bring?",
        members=((_named(REFERENCE, "base"), ("task", "ppl_test", "ppl_general")),),
        every_task=True,
    ),
    Family(
        name="merge",
        question="What did each merge base cost?",
        members=(
            (_named("merged-dequantized", "merged-original"), ("kl_mean", "task", "ppl_test")),
            (_named("merged-dequantized", REFERENCE), ("task", "ppl_test")),
            (_named("merged-original", REFERENCE), ("task", "ppl_test")),
        ),
    ),
    Family(
        name="quantization",
        question="What did quantizing the merged model cost?",
        members=((_against_merge, ("kl_mean", "task", "ppl_test")),),
        every_task=True,
    ),
    Family(
        name="schemes",
        question="Which scheme keeps most for its bytes?",
        members=((_against_each_other, ("kl_mean", "task")),),
    ),
    Family(
        name="merge-first",
        question="Is merged-then-quantized better or worse than quantized base + adapter here?",
        members=((_against_on_base, ("kl_mean", "task")),),
    ),
    Family(
        name="calibration",
        question="Did the calibration data matter here?",
        members=((_against_controls, ("kl_mean", "task")),),
    ),
    Family(
        name="external",
        question="How do models from elsewhere compare?",
        members=((_against_external, ("task", "bits_per_byte", "ppl_test", "kl_mean")),),
    ),
    Family(
        name="kv-cache",
        question="What did quantizing the KV cache cost?",
        members=((_against_bf16_cache, ("kl_mean", "task", "ppl_test")),),
    ),
    Family(
        name="nf4",
        question="What did NF4 cost the base?",
        members=((_named("base-nf4", "base"), ("ppl_general", "ppl_test")),),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """a against b on one metric: difference = a - b, plain and simultaneous interval, and the word for it.

    Attributes:
        flips: Of a task: answers that only b (lost) or only a (gained) has right, see flows/results/flips.py.
    """

    a: str
    b: str
    metric: str
    difference: float
    ci95: Interval
    ci95_adjusted: Interval
    family: str
    family_size: int
    verdict: Verdict
    flips: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "ci95": list(self.ci95), "ci95_adjusted": list(self.ci95_adjusted)}


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A comparison that was planned and could not be made."""

    a: str
    b: str
    metric: str
    family: str
    reason: str


def verdict(metric: str, adjusted: Interval) -> Verdict:
    """The word for a, from the simultaneous interval and nothing else."""
    if adjusted.low <= 0 <= adjusted.high:
        return "no difference shown"
    return "better" if (adjusted.high < 0) == (METRICS[metric].better == "lower") else "worse"


def compare(
    arms: Sequence[RunArm],
    scores: Mapping[str, Mapping[str, RowScores]],
    draws: Draw,
    *,
    reference: str | None = REFERENCE,
    absent: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[list[Comparison], list[LeftOut]]:
    """All families over these arms.

    Args:
        arms: Every arm of the run, whatever became of it.
        scores: Metric of scores.parquet -> rows, for each arm that has them.
        draws: The resamples of some groups; equal groups get equal draws.
        reference: What KL is measured against: its own is zero.
        absent: Why an arm has no scores of a metric, where its job said so.
    """
    comparisons: list[Comparison] = []
    left_out: list[LeftOut] = []
    tasks = sorted({metric for rows in scores.values() for metric in rows if metric.startswith(TASK)})
    for family in FAMILIES:
        able: list[tuple[Pair, Paired]] = []
        for pair in family.pairs(arms, tasks):
            a, b = _rows(pair, scores, reference)
            rows = paired(a, b, METRICS[pair.metric].link)
            if isinstance(rows, Paired):
                able.append((pair, rows))
            else:
                reason = _reason(rows, pair, a, b, absent or {})
                left_out.append(LeftOut(**pair._asdict(), family=family.name, reason=reason))
        comparisons += _compared(family.name, able, draws)
    return comparisons, left_out


def _rows(
    pair: Pair, scores: Mapping[str, Mapping[str, RowScores]], reference: str | None
) -> tuple[RowScores | None, RowScores | None]:
    """Rows of a and b. The reference differs from itself by exactly nothing, so its KL is zero on b's rows."""
    source = METRICS[pair.metric].source or ""
    a, b = (scores.get(slug, {}).get(source) for slug in (pair.a, pair.b))
    if source == "kl" and pair.b == reference and a is not None and pair.b in scores:
        b = a.zeros()
    return a, b


def _reason(
    obstacle: Obstacle,
    pair: Pair,
    a: RowScores | None,
    b: RowScores | None,
    absent: Mapping[str, Mapping[str, str]],
) -> str:
    """Why a comparison cannot be made, in words."""
    named = ((pair.a, a), (pair.b, b))
    if obstacle == "missing":
        missing = [slug for slug, rows in named if rows is None]
        reasons = (absent.get(slug, {}).get(METRICS[pair.metric].source or "") for slug in missing)
        return f"{' and '.join(missing)}: {next(filter(None, reasons), 'no such scores')}"
    if obstacle == "not finite":
        return f"{' and '.join(slug for slug, rows in named if rows and not rows.finite)}: scores that are not finite"
    if obstacle == "other device":
        return f"{OTHER_DEVICE}: {', '.join(f'{slug} on {rows.device}' for slug, rows in named if rows)}"
    return why_not(obstacle, a, {"other rows": "the two arms were not scored on the same rows and tokens"})


def _compared(family: str, able: Sequence[tuple[Pair, Paired]], draws: Draw) -> list[Comparison]:
    """A family's comparisons with their intervals and words."""
    found = differences([rows for _, rows in able], draws)
    return [
        Comparison(
            **pair._asdict(),
            difference=difference.estimate,
            ci95=difference.ci95,
            ci95_adjusted=difference.ci95_adjusted,
            family=family,
            family_size=len(able),
            verdict=verdict(pair.metric, difference.ci95_adjusted),
            flips=flips_json(rows) if is_task(pair.metric) else None,
        )
        for (pair, rows), difference in zip(able, found, strict=True)
    ]
