"""The report of a run: report.json, report.md and report.html, a pure function of steps.json, manifests and files.

docs/report-json.md documents report.json. Rendering twice gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flows.gate.section import gate_of
from flows.report.answers import Answer, Findings, answers
from flows.report.html import figures, page, pictures
from flows.report.text import arm_rows, markdown, print_report
from flows.results.card_fit import fit_of
from flows.results.cells import (
    SIMULATED,
    ArmEvidence,
    Cell,
    Draws,
    cells_of,
    domain_cells,
    gather,
    headline,
    not_ranked,
    speed_record,
)
from flows.results.comparisons import FAMILIES, REFERENCE, compare
from flows.results.layers import layers_of
from flows.results.loading import loading_of
from flows.results.metrics import METRICS, further
from flows.results.power import power
from flows.results.read import Arm, Run, Step, notes, read_run
from flows.results.samples import samples_of
from flows.results.stats import QUANTILE_RESAMPLES, RESAMPLES, SEED
from flows.results.waterfall import waterfall

SCHEMA_VERSION = 1
STAGES = (
    "prepare",
    "rehearse",
    "train",
    "merge",
    "reference",
    "calibrate",
    "choose",
    "quantize",
    "evaluate",
    "measure",
)
NOT_SERVING = "not a serving kernel"
METHOD = {
    "bootstrap": f"paired, over groups of rows, {RESAMPLES:,} resamples, seed {SEED}; all arms see the same draws",
    "differences": "symmetric studentized bootstrap; ci95_adjusted holds together over the family "
    "(max-|t| of the bootstrap, each comparison on its own scale); the verdict follows from ci95_adjusted alone",
    "means": "ppl, bits_per_byte and kl_mean: equal-tailed studentized bootstrap (perplexity: of the loss, then the "
    "exponential)",
    "proportions": "task, task.NAME and top1_agreement: Wilson's interval with the effective sample size between "
    "groups; scores that are not all 0 or 1: as means",
    "quantiles": f"kl_p99: percentile bootstrap over groups, {QUANTILE_RESAMPLES:,} resamples",
    "repeats": "load_s and tokens/s: geometric mean of the repeats, t interval of the logarithms",
    "counted": "size_bytes has no interval; resident_bytes is counted, so its interval is the value",
}

__all__ = ["METHOD", "SCHEMA_VERSION", "Report", "print_report", "render"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A rendered report.

    Attributes:
        folder: The run's folder, where report.json, report.md and report.html now stand.
        json: What report.json holds.
        markdown: What report.md holds.
        table: One row an arm, written out: for a table artifact.
        pictures: The page's figures by name, as SVG files of their own.
    """

    folder: Path
    json: dict[str, Any]
    markdown: str
    table: list[dict[str, str]]
    pictures: dict[str, str]


def render(run_folder: Path, home: Path) -> Report:
    """Compute and write the report of a run.

    Args:
        run_folder: runs/<id>/ with steps.json, recipe.resolved.json and preflight.json.
        home: QUENCH_HOME, which the store's paths are relative to.
    """
    data = evaluate(read_run(run_folder, home))
    text, drawn = markdown(data), figures(data)
    written = {
        "report.json": json.dumps(data, indent=2, allow_nan=False) + "\n",
        "report.md": text,
        "report.html": page(data, drawn),
    }
    for name, content in written.items():
        (run_folder / name).write_text(content, encoding="utf-8")
    return Report(folder=run_folder, json=data, markdown=text, table=arm_rows(data), pictures=pictures(drawn))


def evaluate(run: Run) -> dict[str, Any]:
    """Everything that report.json says."""
    draws = Draws()
    evidence = gather(run)
    cells = {slug: cells_of(one, run, draws) for slug, one in evidence.items()}
    needed = headline(evidence.values())
    unranked = {slug: why for slug, one in evidence.items() if (why := not_ranked(one, cells[slug], needed))}
    comparisons, left_out = compare(
        run.arms,
        {slug: one.scores for slug, one in evidence.items()},
        draws,
        reference=run.reference,
        absent={slug: one.absent for slug, one in evidence.items()},
    )
    found = Findings(
        arms={arm.slug: arm for arm in run.arms},
        cells=cells,
        ranked=frozenset(cells) - frozenset(unranked),
        comparisons=comparisons,
        choice=run.choice,
        error_over_delta=_result(run, "merged-dequantized", "model").get("error_over_delta"),
        adapter=_origin(run),
        reference=run.reference,
    )
    answered = answers(found)
    published = (*METRICS.values(), *further(run.recipe))
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: run.raw.get(name) for name in ("id", "name", "status", "started_at", "finished_at")},
        "verdict": verdict_of(answered),
        "answers": [_answer(one) for one in answered],
        "arms": {slug: _arm(one, run, cells[slug], ranked=slug not in unranked) for slug, one in evidence.items()},
        "not_ranked": unranked,
        "reference": run.reference,
        "only": list(run.raw.get("only") or []),
        "because": list(run.raw.get("because") or []),
        "choice": found.choice and dict(found.choice),
        "error_over_delta": found.error_over_delta,
        "adapter": found.adapter,
        "domains": {slug: _cells(domain_cells(one, draws)) for slug, one in evidence.items()},
        "comparisons": [one.as_dict() for one in comparisons],
        "comparisons_left_out": [asdict(one) for one in left_out],
        "families": [
            {
                "name": family.name,
                "question": family.question,
                "size": sum(one.family == family.name for one in comparisons),
            }
            for family in FAMILIES
        ],
        "waterfall": waterfall(evidence, draws),
        "power": power(evidence),
        "directions": {metric.name: metric.better for metric in published},
        "meanings": {one.name: one.meaning.replace(REFERENCE, run.reference or REFERENCE) for one in published},
        "method": METHOD,
        "data": _data(evidence),
        **_scorers(run),
        "speed": {arm.slug: _speed(arm, run) for arm in run.arms if speed_record(arm, run)},
        "layers": layers_of(run),
        "gate": gate_of(run, evidence, draws),
        "fit": fit_of(run, cells),
        "samples": samples_of(run),
        "loading": loading_of(run),
        "seconds": _stage_seconds(run),
        "wall_seconds": run.raw.get("seconds"),
        "memory": [_memory(step, run.predicted[step.key]) for step in run.steps.values() if step.key in run.predicted],
        "hardware": run.raw["hardware"],
        "versions": run.raw["versions"],
        "sources": _sources(run.raw),
        "code": list(run.raw.get("code") or []),
        "steps": [_step(step) for step in run.steps.values()],
        "failures": [_trouble(step, run) for step in run.steps.values() if not step.ok]
        + [one for step in run.steps.values() for one in _unscored(step, run)],
        "notes": [one._asdict() for one in notes(list(run.steps.values()))],
    }


def verdict_of(answered: Sequence[Answer]) -> list[str]:
    """Three sentences: fine-tuning, scheme, merge-first, merge, others; what cannot be said only where three lack."""
    ordered = [*(answered[index] for index in (0, 2, 3, 1)), *answered[4:]]
    told = [one.short for one in ordered if one.said]
    unsaid = [f"{one.question} {one.short}" for one in ordered if not one.said]
    return [*told, *unsaid][:3]


def _result(run: Run, slug: str, part: Literal["model", "adapter"]) -> Mapping[str, Any]:
    """What the job said that made an arm's model or adapter; empty where there is none."""
    arm = next((one for one in run.arms if one.slug == slug), None)
    step = run.step(getattr(arm, part)) if arm else None
    return step.manifest["result"] if step and step.manifest else {}


def _origin(run: Run) -> dict[str, Any] | None:
    """Where the adapter came from; None where this pipeline trained it."""
    said = _result(run, REFERENCE, "adapter")
    named = ("trained_here", "provenance")
    return {name: said[name] for name in named} if said.get("trained_here") is False else None


def _answer(one: Answer) -> dict[str, Any]:
    return {"question": one.question, "short": one.short, "text": list(one.text)}


def _cells(cells: Mapping[str, Cell]) -> dict[str, Any]:
    return {name: cell.as_dict() for name, cell in cells.items()}


def _arm(one: ArmEvidence, run: Run, cells: Mapping[str, Cell], *, ranked: bool) -> dict[str, Any]:
    return {
        "status": "unavailable" if one.arm.unavailable else "failed" if one.failure else "ok",
        "ranked": ranked,
        "role": one.arm.role,
        "refused": one.arm.refused,
        "external": _source(run.raw["external"][one.arm.slug]) if one.arm.external else None,
        "merge_base": one.arm.merge_base,
        "kv_cache": {"kind": one.arm.kv, "of": one.arm.of, "label": SIMULATED} if one.arm.kv else None,
        "path": _files(one.arm.model, run),
        "adapter_path": _files(one.arm.adapter, run),
        "metrics": _cells(cells),
    }


def _files(key: str | None, run: Run) -> str | None:
    """The folder that is loaded, relative to QUENCH_HOME."""
    step = run.step(key)
    return f"{step.path}/files" if step is not None and step.ok else None


def _data(evidence: Mapping[str, ArmEvidence]) -> dict[str, dict[str, int]]:
    """Rows, groups and tokens behind the published metrics, of the first arm that has them."""
    found: dict[str, dict[str, int]] = {}
    for split, metric in (("test", "nll"), ("general", "nll_general")):
        rows = next((one.scores[metric] for one in evidence.values() if metric in one.scores), None)
        if rows is not None:
            found[split] = {"rows": len(rows.rows), "groups": len(rows.groups), "tokens": rows.n}
    return found


def _speed(arm: Arm, run: Run) -> dict[str, Any]:
    """Kernel, device and threads beside the figures, and whether they say anything about serving."""
    record = speed_record(arm, run)
    named = {name: record.get(name) for name in ("kernel", "serving_kernel", "device", "threads", "batch", "context")}
    return {**named, "label": None if record.get("serving_kernel") else NOT_SERVING}


def _stage_seconds(run: Run) -> dict[str, float]:
    """Seconds that the making of this run's artifacts took, by stage; a hit counts with what it took when made."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for step in run.steps.values():
        if step.manifest is not None:
            found.setdefault(step.stage, []).append(step.manifest["seconds"])
    return {stage: round(sum(seconds), 3) for stage, seconds in found.items() if seconds}


def _memory(step: Step, predicted: Mapping[str, float | None]) -> dict[str, Any]:
    measured = step.manifest or {}
    return {
        "step": step.key,
        "predicted_host_gib": predicted.get("host_gib"),
        "measured_host_gib": measured.get("peak_rss_gib"),
        "predicted_gpu_gib": predicted.get("gpu_gib"),
        "measured_gpu_gib": measured.get("peak_gpu_gib"),
    }


def _sources(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Where base, data (data, data-1 ...) and adapter came from, without their paths on this machine."""
    found = {name: one for name, one in raw.items() if name in ("base", "data", "adapter") or name.startswith("data-")}
    return {name: _source(one) for name, one in found.items()}


def _source(origin: Mapping[str, Any]) -> dict[str, Any]:
    return {"source": origin.get("source"), "digest": origin.get("digest")}


def _step(step: Step) -> dict[str, Any]:
    manifest = step.manifest or {}
    return {
        "key": step.key,
        "status": step.status,
        "path": step.path,
        "fingerprint": step.fingerprint,
        **{name: manifest.get(name) for name in ("digest", "seconds", "attempts", "finished_at", "execution")},
        **({"node": step.node} if step.node else {}),
    }


def _scorers(run: Run) -> dict[str, Any]:
    """Kind of the first scorer, and metric and kind of all."""
    asked = (run.recipe.get("evaluate") or {}).get("scorers") or []
    metrics = ["task", *(one.name for one in further(run.recipe))]
    return {
        "scorer": asked[0]["kind"] if asked else None,
        "scorers": [{"metric": metric, "kind": one["kind"]} for metric, one in zip(metrics, asked, strict=False)],
    }


def _unscored(step: Step, run: Run) -> list[dict[str, Any]]:
    """Scores that an evaluate step could not give, though it has its other ones."""
    found = (step.manifest or {}).get("result", {}).get("problems", {})
    touched = [arm.slug for arm in run.arms if step.key == arm.evaluate]
    return [
        {
            "step": step.key,
            "status": "partial",
            "problem": dict(problem),
            "why": f"{step.key}, {metric}: {step.problems[metric]}",
            "log": None,
            "arms": touched,
        }
        for metric, problem in found.items()
    ]


def _trouble(step: Step, run: Run) -> dict[str, Any]:
    touched: Sequence[str] = [
        arm.slug for arm in run.arms if step.key in (arm.model, arm.adapter, arm.evaluate, arm.measure)
    ]
    return {
        "step": step.key,
        "status": step.status,
        "problem": dict(step.problem) if step.problem else None,
        "why": step.trouble,
        "log": step.log,
        "arms": touched,
    }
