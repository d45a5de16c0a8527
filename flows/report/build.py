"""The report of a run: report.json, report.md and report.html, a pure function of steps.json, manifests and files.

docs/report-json.md documents report.json. Rendering twice gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from flows.gate.section import gate_of
from flows.report.answers import Answer, Findings, answers
from flows.report.document import (
    About,
    ArmJson,
    ArmSection,
    Differences,
    Document,
    Nulls,
    Reading,
    Served,
    ServedJson,
    Shipping,
    SpeedJson,
    SplitSize,
    Words,
)
from flows.report.html import figures, page, pictures
from flows.report.making import making_of, source_of
from flows.report.registered import registered_of
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
from flows.results.comparisons import FAMILIES, REFERENCE, Comparison, LeftOut, compare
from flows.results.dev import dev_of
from flows.results.draws import QUANTILE_RESAMPLES, RESAMPLES, SEED
from flows.results.kept import kept
from flows.results.layers import layers_of
from flows.results.loading import loading_of
from flows.results.metrics import METRICS, further
from flows.results.nulls import Noise, no_more_than_noise, noise_of
from flows.results.nulls import section as noise_section
from flows.results.power import power
from flows.results.read import Run, read_run
from flows.results.samples import samples_of
from flows.results.served import served_of
from flows.results.waterfall import waterfall
from recipes.checks.power import FEWEST_GROUPS

SCHEMA_VERSION = 1
NOT_SERVING = "not a serving kernel"
METHOD = {
    "bootstrap": f"paired, over groups of rows, {RESAMPLES:,} resamples, seed {SEED}; all arms see the same draws",
    "differences": "symmetric studentized bootstrap; ci95_adjusted holds together over the family "
    "(max-|t| of the bootstrap, each comparison on its own scale); the verdict follows from ci95_adjusted alone",
    "means": "ppl, bits_per_byte and kl_mean: equal-tailed studentized bootstrap (perplexity: of the loss, then the "
    "exponential)",
    "few groups": "groups count as (sum n)^2 / sum n^2 of equal size; critical values are at least Student's t with "
    f"one degree less, standard errors the jackknife's; below {FEWEST_GROUPS} there is no interval and no verdict",
    "flips": "McNemar's exact test, two-sided, rows for themselves; the interval decides",
    "kept": "Fieller's interval of two paired differences; none where the gain itself is not shown",
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
        table: One row per arm, written out: for a table artifact.
        pictures: The page's figures by name, as SVG files of their own.
    """

    folder: Path
    json: Document
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


def evaluate(run: Run) -> Document:
    """Everything that report.json says, section by section in the order of the file."""
    draws = Draws()
    evidence = gather(run)
    cells = {slug: cells_of(arm, run, draws) for slug, arm in evidence.items()}
    needed = headline(evidence.values())
    unranked = {slug: why for slug, arm in evidence.items() if (why := not_ranked(arm, cells[slug], needed))}
    comparisons, left_out = compare(
        run.arms,
        {slug: arm.scores for slug, arm in evidence.items()},
        draws,
        reference=run.reference,
        absent={slug: arm.absent for slug, arm in evidence.items()},
    )
    findings = Findings(
        arms={arm.slug: arm for arm in run.arms},
        cells=cells,
        ranked=frozenset(cells) - frozenset(unranked),
        comparisons=comparisons,
        left_out=left_out,
        choice=run.choice,
        error_over_delta=_result(run, "merged-dequantized", "model").get("error_over_delta"),
        adapter=_adapter_origin(run),
        reference=run.reference,
    )
    served = served_of(run, evidence, draws)
    noise = noise_of(run, evidence)
    differences = _differences(run, evidence, comparisons, left_out, draws, noise=noise)
    return {
        **_about(run),
        **_words(answers(findings)),
        **_matrix(run, evidence, findings, unranked, draws),
        **differences,
        "kept": kept(evidence, draws),
        **_nulls(noise, differences, draws),
        **_reading(run, evidence),
        **_served(served),
        **_shipping(run, evidence, cells, draws, served=served, power=differences["power"]),
        "dev": dev_of(run, evidence, draws),
        **making_of(run),
    }


# ---- the sections


def _about(run: Run) -> About:
    return {
        "schema_version": SCHEMA_VERSION,
        "id": run.raw.get("id"),
        "name": run.raw.get("name"),
        "status": run.raw.get("status"),
        "started_at": run.raw.get("started_at"),
        "finished_at": run.raw.get("finished_at"),
    }


def _words(answered: Sequence[Answer]) -> Words:
    return {
        "verdict": verdict_of(answered),
        "answers": [
            {"question": answer.question, "short": answer.short, "text": list(answer.text)} for answer in answered
        ],
    }


def _matrix(
    run: Run, evidence: Mapping[str, ArmEvidence], findings: Findings, unranked: dict[str, str], draws: Draws
) -> ArmSection:
    return {
        "arms": {slug: _arm(arm, run, findings) for slug, arm in evidence.items()},
        "not_ranked": unranked,
        "reference": run.reference,
        "only": list(run.raw.get("only") or []),
        "because": list(run.raw.get("because") or []),
        "choice": dict(findings.choice) if findings.choice is not None else None,
        "error_over_delta": findings.error_over_delta,
        "adapter": findings.adapter,
        "domains": {slug: _cells(domain_cells(arm, draws)) for slug, arm in evidence.items()},
    }


def _differences(
    run: Run,
    evidence: Mapping[str, ArmEvidence],
    comparisons: Sequence[Comparison],
    left_out: Sequence[LeftOut],
    draws: Draws,
    *,
    noise: Noise | None,
) -> Differences:
    sizes = Counter(comparison.family for comparison in comparisons)
    lines = [comparison.as_dict() for comparison in comparisons]
    if noise is not None:
        for line, comparison in zip(lines, comparisons, strict=True):
            line["noise"] = no_more_than_noise(comparison, noise, evidence, reference=run.reference)
    return {
        "comparisons": lines,
        "comparisons_left_out": [asdict(comparison) for comparison in left_out],
        "families": [
            {"name": family.name, "question": family.question, "size": sizes[family.name]} for family in FAMILIES
        ],
        "waterfall": waterfall(evidence, draws),
        "power": power(evidence),
    }


def _nulls(noise: Noise | None, differences: Differences, draws: Draws) -> Nulls:
    if noise is None:
        return {}
    lines = differences["comparisons"]
    return {"nulls": noise_section(noise, [line for line in lines if line["noise"]], len(lines), draws)}


def _reading(run: Run, evidence: Mapping[str, ArmEvidence]) -> Reading:
    metrics = (*METRICS.values(), *further(run.recipe))
    reference = run.reference or REFERENCE
    scorers = (run.recipe.get("evaluate") or {}).get("scorers") or []
    scored = ["task", *(metric.name for metric in further(run.recipe))]
    return {
        "directions": {metric.name: metric.better for metric in metrics},
        "meanings": {metric.name: metric.meaning.replace(REFERENCE, reference) for metric in metrics},
        "method": METHOD,
        "data": _data(evidence),
        "scorer": scorers[0]["kind"] if scorers else None,
        "scorers": [
            {"metric": metric, "kind": scorer["kind"]} for metric, scorer in zip(scored, scorers, strict=False)
        ],
        "speed": {arm.slug: _speed(record) for arm in run.arms if (record := speed_record(arm, run))},
        "layers": layers_of(run),
    }


def _served(served: dict[str, Any] | None) -> Served:
    return {"served": cast("ServedJson", served)} if served is not None else {}


def _shipping(
    run: Run,
    evidence: Mapping[str, ArmEvidence],
    cells: Mapping[str, Mapping[str, Cell]],
    draws: Draws,
    *,
    served: dict[str, Any] | None,
    power: Sequence[Mapping[str, Any]],
) -> Shipping:
    gate = gate_of(run, evidence, draws, served=served)
    return {
        "gate": gate,
        "registered": registered_of(run.folder, gate=gate, power=power),
        "fit": fit_of(run, cells),
        "samples": samples_of(run),
        "loading": loading_of(run),
    }


# ---- what they are made of


def verdict_of(answered: Sequence[Answer]) -> list[str]:
    """Three sentences: fine-tuning, scheme, merge-first, merge, others; what cannot be said only where three lack."""
    ordered = [*(answered[index] for index in (0, 2, 3, 1)), *answered[4:]]
    known = [answer.short for answer in ordered if answer.known]
    unknown = [f"{answer.question} {answer.short}" for answer in ordered if not answer.known]
    return [*known, *unknown][:3]


def _result(run: Run, slug: str, part: Literal["model", "adapter"]) -> Mapping[str, Any]:
    """The result of the job that made an arm's model or adapter; empty where there is none."""
    arm = run.arm(slug)
    step = run.step(getattr(arm, part)) if arm else None
    return step.manifest["result"] if step and step.manifest else {}


def _adapter_origin(run: Run) -> dict[str, Any] | None:
    """Where the adapter came from; None where this pipeline trained it."""
    result = _result(run, REFERENCE, "adapter")
    names = ("trained_here", "provenance")
    return {name: result[name] for name in names} if result.get("trained_here") is False else None


def _cells(cells: Mapping[str, Cell]) -> dict[str, Any]:
    return {name: cell.as_dict() for name, cell in cells.items()}


def _arm(evidence: ArmEvidence, run: Run, findings: Findings) -> ArmJson:
    arm = evidence.arm
    return {
        "status": "unavailable" if arm.unavailable else "failed" if evidence.failure else "ok",
        "ranked": arm.slug in findings.ranked,
        "role": arm.role,
        "refused": arm.refused,
        "external": source_of(run.raw["external"][arm.slug]) if arm.external else None,
        "merge_base": arm.merge_base,
        "kv_cache": {"kind": arm.kv, "of": arm.of, "label": SIMULATED} if arm.kv else None,
        "path": _files(arm.model, run),
        "adapter_path": _files(arm.adapter, run),
        "metrics": _cells(findings.cells[arm.slug]),
    }


def _files(key: str | None, run: Run) -> str | None:
    """The folder that is loaded, relative to QUENCH_HOME."""
    step = run.step(key)
    return f"{step.path}/files" if step is not None and step.ok else None


def _data(evidence: Mapping[str, ArmEvidence]) -> dict[str, SplitSize]:
    """Rows, groups and tokens behind the published metrics, of the first arm that has them."""
    sizes: dict[str, SplitSize] = {}
    for split, metric in (("test", "nll"), ("general", "nll_general")):
        rows = next((arm.scores[metric] for arm in evidence.values() if metric in arm.scores), None)
        if rows is not None:
            sizes[split] = {"rows": len(rows.rows), "groups": len(rows.groups), "tokens": rows.n}
    return sizes


def _speed(record: Mapping[str, Any]) -> SpeedJson:
    return {
        "kernel": record.get("kernel"),
        "serving_kernel": record.get("serving_kernel"),
        "device": record.get("device"),
        "threads": record.get("threads"),
        "batch": record.get("batch"),
        "context": record.get("context"),
        "label": None if record.get("serving_kernel") else NOT_SERVING,
    }
