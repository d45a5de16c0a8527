"""The cells of the report: every metric of every arm with its interval, or the reason why there is none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flows.results.draws import QUANTILE_RESAMPLES, RESAMPLES, Counts, Drawn, Resamples, draw
from flows.results.metrics import HEADLINE, METRICS, NOT_COUNTED, PER_DOMAIN, SPEED, TASK, Metric, further
from flows.results.paired import OTHER_DEVICE, few_groups
from flows.results.read import REFERENCE, Run, RunArm
from flows.results.rows import RowScores, TokenKL, read_kl, read_scores, same_device
from flows.results.sizes import size_bytes
from flows.results.stats import (
    Estimand,
    Interval,
    effective_groups,
    mean_interval,
    proportion_interval,
    quantile_interval,
    repeats,
    studentized,
    upper_quantile,
)
from recipes.checks.power import FEWEST_GROUPS, too_few_groups

MERGED = "evaluate/merged-"
SIMULATED = "simulated: storage only"  # what the figures of a quantized KV cache are
UPSTREAM = ("prepare", "rehearse", "train", "merge", "reference", "calibrate", "choose", "quantize")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One metric of one arm. `reason` is set whenever value is null, and where an interval is missing."""

    value: float | None
    ci95: Interval | None = None
    n: int | None = None
    split: str | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As report.json has it."""
        return {**vars(self), "ci95": None if self.ci95 is None else list(self.ci95)}


KEPT_BYTES = 128 * 2**20  # of draws that are kept at once: made anew, an interval takes some five times as long


@dataclass
class Draws:
    """Resamples by number of groups: all arms and metrics on the same groups share them, so they are paired.

    Those used last are kept, up to KEPT_BYTES (13,421 groups) together; larger ones are made anew at every use.
    """

    known: dict[int, Counts] = field(default_factory=dict)

    def __call__(self, groups: tuple[str, ...]) -> Drawn:
        """[resamples, groups]."""
        number = len(groups)
        if number * RESAMPLES > KEPT_BYTES:
            return Resamples(number)
        kept = self.known.pop(number) if number in self.known else draw(number)
        while self.known and (sum(self.known) + number) * RESAMPLES > KEPT_BYTES:
            del self.known[next(iter(self.known))]
        self.known[number] = kept
        return kept


@dataclass(frozen=True, kw_only=True)
class ArmEvidence:
    """What is known about an arm.

    Attributes:
        failure: Why its cells are null; None where it was evaluated.
        scores: Metric of scores.parquet -> rows of its published split.
        unlike: Why its rows cannot stand beside the other arms'; None where they are the same.
        elsewhere: It was scored on another device than most arms, and on which; None where it was not.
        problems: Metric of scores.parquet -> why a scorer could not give it; the run ends with 1 for it.
        absent: Metric of scores.parquet -> why the arm has none, where its job said so.
        is_reference: KL and agreement are measured against it.
    """

    arm: RunArm
    failure: str | None
    scores: Mapping[str, RowScores]
    kl: TokenKL | None
    unlike: str | None = None
    elsewhere: str | None = None
    problems: Mapping[str, str] = field(default_factory=dict[str, str])
    absent: Mapping[str, str] = field(default_factory=dict)
    is_reference: bool = False


def gather(run: Run) -> dict[str, ArmEvidence]:
    """Read every arm's scores; mark arms that were scored on other rows or tokens than the reference."""
    evidence: dict[str, ArmEvidence] = {}
    for arm in run.arms:
        failure = _failure(arm, run)
        scored = None if failure else run.step(arm.evaluate)
        files = scored.files if scored else None
        evidence[arm.slug] = ArmEvidence(
            arm=arm,
            failure=failure,
            scores=read_scores(files) if files else {},
            kl=read_kl(files) if files else None,
            problems=scored.problems if scored else {},
            absent=(scored.manifest or {}).get("result", {}).get("absent", {}) if scored else {},
            is_reference=arm.slug == run.reference,
        )
    scored = [arm for arm in evidence.values() if arm.failure is None]
    if not scored:
        return evidence
    reference = min(scored, key=lambda arm: (not arm.is_reference, arm.arm.slug != REFERENCE))
    usual = _usual_device(scored, first=reference)
    return {slug: _on(_against(arm, reference), usual) for slug, arm in evidence.items()}


def _device(arm: ArmEvidence) -> str:
    return next((rows.device for rows in arm.scores.values()), "")


def _usual_device(scored: Sequence[ArmEvidence], *, first: ArmEvidence) -> str:
    """The kind of device that most arms were scored on; of several with equally many, that of `first`."""
    counted = Counter(device for arm in scored if (device := _device(arm)))
    return max(counted, key=lambda device: (counted[device], device == _device(first)), default="")


def _on(arm: ArmEvidence, usual: str) -> ArmEvidence:
    device = _device(arm)
    if same_device(device, usual):
        return arm
    reason = f"{OTHER_DEVICE}: {device}, most arms on {usual}"
    return replace(arm, elsewhere=reason, unlike=arm.unlike or reason)


def _failure(arm: RunArm, run: Run) -> str | None:
    if arm.unavailable:
        return arm.unavailable
    scored = run.step(arm.evaluate)
    if scored is not None and (scored.ok or scored.status == "failed"):
        return None if scored.ok else scored.trouble
    behind = [step for key in (arm.model, arm.adapter) if (step := run.step(key)) and step.status == "failed"]
    behind += [step for step in run.steps.values() if step.status == "failed" and step.stage in UPSTREAM[:-1]]
    if arm.merge_base == "auto":  # undecided: the choice needs the scores of both merged models
        behind += [step for key, step in run.steps.items() if step.status == "failed" and key.startswith(MERGED)]
    if behind:
        return behind[0].trouble
    return scored.trouble if scored else f"the run ended before evaluate/{arm.slug}"


def _against(arm: ArmEvidence, reference: ArmEvidence) -> ArmEvidence:
    other = [
        metric
        for metric, rows in reference.scores.items()
        if metric in arm.scores and not rows.same_rows(arm.scores[metric])
    ]
    if not other:
        return arm
    reason = f"{', '.join(other)}: scored on other rows or tokens than {reference.arm.slug}"
    return replace(arm, unlike=reason)


def headline(evidence: Iterable[ArmEvidence]) -> list[str]:
    """What an arm must have to be ranked.

    Plain texts have no prompt, so that no arm has a task score; without a reference none has a KL.
    """
    scored = {metric for arm in evidence for metric in (*arm.scores, *arm.problems)}
    lacking = {name for name, source in (("task", "task"), ("kl_mean", "kl")) if source not in scored}
    return [name for name in HEADLINE if name not in lacking]


def not_ranked(arm: ArmEvidence, cells: Mapping[str, Cell], needed: Sequence[str]) -> str | None:
    """Why an arm is left out of the ranking, or None. `needed` is `headline` of all arms."""
    if arm.arm.null:
        return f"it is {arm.arm.of}, computed in another way"
    if arm.failure or arm.unlike:
        return arm.failure or arm.unlike
    empty = [name for name in needed if cells[name].value is None]
    return f"{empty[0]}: {cells[empty[0]].reason}" if empty else None


def cells_of(arm: ArmEvidence, run: Run, draws: Draws) -> dict[str, Cell]:
    """All published metrics of an arm."""
    quality = {
        metric.name: _quality(metric, arm, run, draws)
        for metric in (*METRICS.values(), *further(run.recipe))
        if metric.source is not None
    }
    size, reason = (None, arm.failure) if arm.arm.unavailable else size_bytes(arm.arm, run)
    counted = Cell(value=size, n=None if size is None else 1, reason=reason)
    return {**quality, "size_bytes": counted, **_speed(arm, run)}


def _quality(metric: Metric, arm: ArmEvidence, run: Run, draws: Draws) -> Cell:
    if arm.failure:
        return Cell(value=None, split=metric.split, reason=arm.failure)
    rows = arm.scores.get(metric.source or "")
    if arm.is_reference and metric.source in ("kl", "agree"):
        value, n = (0.0 if metric.source == "kl" else 1.0), (rows.n if rows else None)
        return Cell(value=value, n=n, split=metric.split, reason="the reference itself: so by definition")
    if rows is None:
        return Cell(value=None, split=metric.split, reason=_no_rows(metric, arm, run))
    cell = rows_cell(metric, rows, arm.kl, draws)
    return replace(cell, reason=cell.reason or arm.elsewhere)


def _no_rows(metric: Metric, arm: ArmEvidence, run: Run) -> str:
    if why := arm.problems.get(metric.source or "") or arm.absent.get(metric.source or ""):
        return why
    if metric.split == "general" and not (run.recipe.get("data") or {}).get("general"):
        return "the recipe has no data.general"
    if metric.source == "truncated" and "task" in {*arm.scores, *arm.problems}:
        return NOT_COUNTED
    if metric.source in ("task", "truncated") or (metric.source or "").startswith(TASK):
        return "no row of test has a prompt to answer"
    return f"the arm's scores have no {metric.source} rows of {metric.split}"


def rows_cell(metric: Metric, rows: RowScores, kl: TokenKL | None, draws: Draws) -> Cell:
    """Value and interval from rows (all of them or a domain's)."""
    if not rows.finite:
        broken = int((~np.isfinite(rows.total)).sum())
        return Cell(value=None, split=metric.split, reason=f"{broken} of {len(rows.rows)} rows have no finite score")
    if metric.interval == "percentile":
        return _tail_cell(metric, kl)
    value, reason = rows.sums.value, few_groups(rows)
    interval = None if reason else _interval(metric, rows, draws)
    if metric.name.startswith("ppl"):
        value = float(np.exp(value))
        interval = interval and Interval(*(float(np.exp(end)) for end in interval))
    return Cell(value=value, ci95=interval, n=rows.n, split=metric.split, reason=reason)


def _interval(metric: Metric, rows: RowScores, draws: Draws) -> Interval:
    """Of a mean or a share; losses and KL are not negative, scores end at 1."""
    if metric.interval == "wilson" and (metric.source == "agree" or rows.binary):
        return proportion_interval(rows.sums)
    low, high = mean_interval(studentized([Estimand(rows.sums)], draws(rows.groups))[0])
    return Interval(max(low, 0.0), min(high, 1.0 if metric.interval == "wilson" else np.inf))


def _tail_cell(metric: Metric, kl: TokenKL | None) -> Cell:
    if kl is None:
        return Cell(value=None, split=metric.split, reason="the arm's scores have no kl.parquet rows of test")
    if not np.isfinite(kl.kl).all():
        return Cell(value=None, split=metric.split, reason="tokens without a finite KL")
    value, n = upper_quantile(kl.kl), len(kl.kl)
    effective = effective_groups(np.bincount(kl.group).astype(np.float64))
    if effective < FEWEST_GROUPS:
        return Cell(value=value, n=n, split=metric.split, reason=too_few_groups(len(kl.groups), effective))
    low, high = quantile_interval(kl.kl, kl.group, Resamples(len(kl.groups)).first(QUANTILE_RESAMPLES))
    return Cell(value=value, ci95=Interval(min(low, value), max(high, value)), n=n, split=metric.split)


def domain_cells(arm: ArmEvidence, draws: Draws) -> dict[str, Cell]:
    """`<metric>@<domain>` for every domain that the rows name; empty where there is at most one."""
    rows = arm.scores.get("nll", arm.scores.get("bits"))
    if arm.failure or rows is None:
        return {}
    domains = sorted({str(name) for name in rows.domain})
    if len(domains) < 2:
        return {}
    cells: dict[str, Cell] = {}
    for name in (*PER_DOMAIN, *(metric for metric in arm.scores if metric.startswith(TASK))):
        metric = METRICS[name]
        rows = arm.scores.get(metric.source or "")
        if rows is None or (arm.is_reference and metric.source in ("kl", "agree")):
            continue
        for domain in domains:
            part = rows.of_domain(domain)
            if len(part.rows):
                cells[f"{name}@{domain}"] = rows_cell(metric, part, None, draws)
    return cells


def _speed(arm: ArmEvidence, run: Run) -> dict[str, Cell]:
    loaded = next((other for other in run.arms if other.slug == arm.arm.of), arm.arm)  # whose files they are
    reason = arm.arm.unavailable or _unmeasured(loaded, run)
    if reason:
        return {name: Cell(value=None, reason=reason) for name in SPEED}
    measured = speed_record(loaded, run)
    cells = {name: timed_cell(measured.get(name), name) for name in SPEED}
    if arm.arm.null is not None:
        same = Cell(value=None, reason=f"the files of {arm.arm.of}, whose speed was measured")
        return {name: cell if name == "resident_bytes" else same for name, cell in cells.items()}
    if arm.arm.kv is None:
        return cells
    simulated = Cell(value=None, reason=SIMULATED)
    return {name: cell if name == "resident_bytes" else simulated for name, cell in cells.items()}


def _unmeasured(arm: RunArm, run: Run) -> str | None:
    if arm.measure is None:
        return "measure.enabled is false in the recipe"
    step = run.step(arm.measure)
    if step is None:
        return f"the run ended before {arm.measure}"
    return None if step.ok else step.trouble


def speed_record(arm: RunArm, run: Run) -> dict[str, Any]:
    """speed.json of an arm; empty where it was not measured."""
    step = run.step(arm.measure)
    if step is None or not step.ok or step.files is None:
        return {}
    return json.loads((step.files / "speed.json").read_text(encoding="utf-8"))


def timed_cell(timed: list[float] | float | None, name: str, *, file: str = "speed.json") -> Cell:
    """Geometric mean of repeats with its interval; of a number that was counted the number."""
    if timed is None:
        return Cell(value=None, reason=f"{file} has no {name}")
    if isinstance(timed, int | float):  # counted, not sampled: the interval is the value
        return Cell(value=timed, ci95=Interval(timed, timed), n=1)
    if len(timed) < 2 or min(timed) <= 0:
        return Cell(value=None, n=len(timed), reason=f"timed {len(timed)} times ({timed}): too few for an interval")
    value, interval = repeats(timed)
    return Cell(value=value, ci95=interval, n=len(timed))
