"""Figures of dev: task scores and loss of every arm, and their differences from the merged model.

They are for tuning, so that nobody has to tune on test. Dev names the candidate (flows/gate/candidate.py); whether it
is promoted is decided on test. Cells and differences come from the functions that make those of test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from flows.results.cells import ArmEvidence, Cell, Draws, rows_cell
from flows.results.comparisons import merged_schemes
from flows.results.metrics import METRICS, TASK, Metric
from flows.results.paired import Difference, Obstacle, Paired, differences, paired, why_not
from flows.results.read import Run, RunArm
from flows.results.rows import RowScores, read_dev

SPLIT = "dev"
LOSS = Metric(
    name="loss",
    label="loss",
    better="lower",
    source="nll",
    split=SPLIT,
    interval="studentized",
    meaning="mean loss over completion tokens of dev, nats a token",
)
Scores = Mapping[str, RowScores]
REASONS: dict[Obstacle, str] = {
    "missing": "one of the two has no such scores of dev",
    "other rows": "the two arms were not scored on the same rows and tokens of dev",
}


class _Compared(NamedTuple):
    """An arm, the merged model that it is compared with, and the metric."""

    arm: str
    against: str
    metric: Metric


def dev_of(run: Run, evidence: Mapping[str, ArmEvidence], draws: Draws) -> dict[str, Any] | None:
    """`dev` of report.json; None where no arm has scores of dev."""
    evidence = {slug: arm for slug, arm in evidence.items() if arm.arm.null is None}  # nothing is tuned by noise
    scores = {slug: dev_scores(arm, run) for slug, arm in evidence.items()}
    metrics = _metrics(scores, evidence)
    if not metrics:
        return None
    wanted = [
        _Compared(slug, against, metric)
        for slug, arm in evidence.items()
        if scores[slug] and (against := merged_of(arm.arm, run.arms))
        for metric in metrics
    ]
    able, reasons = _pairs(wanted, scores, evidence)
    found = dict(zip(able, differences(list(able.values()), draws), strict=True))
    rows = next((one[LOSS.source or ""] for one in scores.values() if LOSS.source in one), None)
    return {
        "split": SPLIT,
        "rows": len(rows.rows) if rows else 0,
        "groups": len(rows.groups) if rows else 0,
        "tokens": rows.n if rows else 0,
        "family_size": len(able),
        "arms": {
            slug: {
                "metrics": {one.name: _cell(one, arm, scores[slug], draws).as_dict() for one in metrics},
                "against": next((one.against for one in wanted if one.arm == slug), None),
                "differences": {
                    one.metric.name: _difference(one.metric, found.get(one), reasons.get(one))
                    for one in wanted
                    if one.arm == slug
                },
            }
            for slug, arm in evidence.items()
        },
    }


def merged_of(arm: RunArm, arms: Sequence[RunArm]) -> str | None:
    """The merged model that an arm is compared with: the one that it was made from, else the one that is quantized."""
    slugs = {other.slug for other in arms}
    chosen = [f"merged-{other.merge_base}" for other in (arm, *merged_schemes(arms)) if other.merge_base]
    wanted = (*chosen, "merged-dequantized", "merged-original")
    return next((slug for slug in wanted if slug in slugs and slug != arm.slug), None)


def dev_scores(arm: ArmEvidence, run: Run) -> Scores:
    """An arm's scores of dev by metric; empty where it has none."""
    step = None if arm.failure else run.step(arm.arm.evaluate)
    return read_dev(step.files) if step and step.files else {}


def undecoded(arm: ArmEvidence) -> dict[str, str]:
    """Metric of scores.parquet -> why the arm has none of dev, though it has of test."""
    own = (name.rpartition("/") for name in arm.absent)
    return {metric: arm.absent[f"{metric}/{split}"] for metric, _, split in own if split == SPLIT}


def _metrics(scores: Mapping[str, Scores], evidence: Mapping[str, ArmEvidence]) -> list[Metric]:
    """Task scores of all scorers and the loss, those that an arm has of dev or says why it has not."""
    sources = {source for one in scores.values() for source in one}
    sources |= {source for arm in evidence.values() for source in undecoded(arm)}
    tasks = [name for name in sorted(sources) if name == "task" or name.startswith(TASK)]
    return [*(replace(METRICS[name], split=SPLIT) for name in tasks), *([LOSS] if LOSS.source in sources else [])]


def _cell(metric: Metric, arm: ArmEvidence, scores: Scores, draws: Draws) -> Cell:
    source = metric.source or ""
    if source in scores:
        return rows_cell(metric, scores[source], None, draws)
    return Cell(value=None, split=SPLIT, reason=arm.failure or _missing(arm, source) or "no such scores of dev")


def _missing(arm: ArmEvidence, source: str) -> str | None:
    return arm.problems.get(source) or arm.absent.get(source) or undecoded(arm).get(source)


def _pairs(
    wanted: Sequence[_Compared], scores: Mapping[str, Scores], evidence: Mapping[str, ArmEvidence]
) -> tuple[dict[_Compared, Paired], dict[_Compared, str]]:
    """The pairs that can be compared, and why the others cannot."""
    able: dict[_Compared, Paired] = {}
    reasons: dict[_Compared, str] = {}
    for one in wanted:
        source, both = one.metric.source or "", (one.arm, one.against)
        a, b = (scores[slug].get(source) for slug in both)
        pair = paired(a, b, one.metric.link)
        if isinstance(pair, Paired):
            able[one] = pair
        else:
            told = (_missing(evidence[slug], source) for slug in both if source not in scores[slug])
            reasons[one] = next(filter(None, told), None) or why_not(pair, a, REASONS)
    return able, reasons


def _difference(metric: Metric, found: Difference | None, reason: str | None) -> dict[str, Any]:
    """Arm - merged with its intervals and the word for the arm, or why there is none."""
    if found is None:
        return {"difference": None, "ci95": None, "ci95_adjusted": None, "verdict": None, "reason": reason}
    low, high = found.ci95_adjusted
    word = "better" if (high < 0) == (metric.better == "lower") else "worse"
    return {
        "difference": found.estimate,
        "ci95": list(found.ci95),
        "ci95_adjusted": [low, high],
        "verdict": "no difference shown" if low <= 0 <= high else word,
        "reason": None,
    }
