"""`served` of the report: what a real engine gave for each arm, beside what was measured, and how fast it was.

flows/results/served_checks.py has the rule of the verdict, flows/results/throughput.py the speeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flows.results.cells import ArmEvidence, Cell, Draws, rows_cell
from flows.results.metrics import NOT_COUNTED, SERVED, Metric, difference_text, significant, value_text
from flows.results.paired import Difference, Paired, differences
from flows.results.read import Run, RunArm, RunStep
from flows.results.rows import RowScores, read_scores
from flows.results.served_checks import (
    ALLOWED,
    BAND,
    CHANGED,
    EXCLUDED,
    MOST_CHANGED,
    NOISE,
    PAIRS,
    ServedCheck,
    ServedScores,
    judge_served,
    verdict_of,
)
from flows.results.throughput import OUTPUT, at_most, loads_of, ranks
from recipes.arms import FLOOR

SERVED_BY = {str(metric.source): name for name, metric in SERVED.items()}  # metric of scores.parquet -> its figure
LIMITS = {
    "loss": BAND,
    "loss_excluded": EXCLUDED,
    "rows_times": NOISE,
    "rows_more": ALLOWED,
    "answers": CHANGED,
    "answers_excluded": MOST_CHANGED,
}
MARKS = {"served as measured": "✓", "differs by more than the floor": "▼", "undecided": "?", "not served": "–"}


def served_of(run: Run, evidence: Mapping[str, ArmEvidence], draws: Draws) -> dict[str, Any] | None:
    """What report.json holds under `served`; None where the run neither served an arm nor says why it did not."""
    if not any(arm.serve or arm.unserved for arm in run.arms):
        return None
    steps = {arm.slug: step for arm in run.arms if (step := run.step(arm.serve)) is not None and step.ok}
    scores = {slug: ServedScores(_rows(step), evidence[slug].scores) for slug, step in steps.items()}
    judged = judge_served(scores, FLOOR, draws)
    apart = _differences(scores, draws)
    arms = {
        slug: {
            "step": step.key,
            "verdict": verdict_of(judged.checks[slug]),
            "checks": [{**check.as_dict(), "text": check_text(check)} for check in judged.checks[slug]],
            "metrics": _cells(scores[slug], draws),
            "own": {SERVED_BY[metric]: _own(scores[slug], metric) for metric in PAIRS},
            "differences": apart[slug],
            **_engine(step),
        }
        for slug, step in steps.items()
    }
    ranked = ranks({slug: arm for slug, arm in arms.items() if not arm["verdict"].startswith("differs")})
    section = {
        "limits": LIMITS,
        "floor": {"arm": judged.floor, "reason": judged.no_floor},
        "arms": {slug: {**arm, "rank": ranked.get(slug)} for slug, arm in arms.items()},
        "not_served": dict(_not_served(run)),
    }
    return {**section, "text": list(sentences(section))}


def _rows(step: RunStep) -> dict[str, RowScores]:
    return read_scores(step.files) if step.files else {}


def _engine(step: RunStep) -> dict[str, Any]:
    """What served.json says of the engine, and how fast it was."""
    assert step.files is not None  # the step is ok
    record = json.loads((step.files / "served.json").read_text(encoding="utf-8"))
    named = ("engine", "version", "device", "kernel", "start_s", "resident_gib", "kv_cache_dtype", "command")
    return {**{name: record.get(name) for name in named}, "loads": loads_of(record)}


def _cells(scores: ServedScores, draws: Draws) -> dict[str, Any]:
    cells = {name: _cell(metric, scores.served.get(str(metric.source)), draws) for name, metric in SERVED.items()}
    if "served_truncated" not in scores.served and "served_equal" in scores.served:
        cells["served_truncated"]["reason"] = NOT_COUNTED
    return cells


def _cell(metric: Metric, rows: RowScores | None, draws: Draws) -> dict[str, Any]:
    """One figure of the engine over test."""
    if rows is None:
        return Cell(value=None, split="test", reason="no row of test has a prompt to answer").as_dict()
    return rows_cell(metric, rows, None, draws).as_dict()


def _own(scores: ServedScores, metric: str) -> float | None:
    """The arm's own figure on the rows that both have."""
    pair = scores.pair(metric)
    return pair.b.sums.value if isinstance(pair, Paired) else None


def _differences(scores: Mapping[str, ServedScores], draws: Draws) -> dict[str, dict[str, Any]]:
    """Arm -> served - own with its paired interval, for loss (nats a token) and task (a share); or the reason."""
    pairs = {(slug, metric): one.pair(metric) for slug, one in scores.items() for metric in PAIRS}
    able = {place: pair for place, pair in pairs.items() if isinstance(pair, Paired)}
    made = dict(zip(able, differences(list(able.values()), draws), strict=True))
    found: dict[str, dict[str, Any]] = {slug: {} for slug in scores}
    for (slug, metric), pair in pairs.items():
        found[slug][SERVED_BY[metric]] = _difference(made.get((slug, metric)), pair)
    return found


def _difference(made: Difference | None, pair: Paired | str) -> dict[str, Any]:
    if made is None or isinstance(pair, str):
        return {"difference": None, "ci95": None, "n": None, "reason": str(pair)}
    return {"difference": made.estimate, "ci95": list(made.ci95), "n": len(pair.a.rows), "reason": None}


def _not_served(run: Run) -> Iterator[tuple[str, str]]:
    """Arms that no engine served, and why: before the run, or in it."""
    for arm in run.arms:
        if reason := unserved(arm, run):
            yield arm.slug, reason


def unserved(arm: RunArm, run: Run) -> str | None:
    """Why an arm was not served; None where it was, or nobody asked."""
    if arm.serve is None:
        return arm.unserved
    step = run.step(arm.serve)
    if step is None:
        return f"the run ended before {arm.serve}"
    return None if step.ok else step.trouble


# ---- in words


def check_text(check: ServedCheck) -> str:
    """`loss +0.000056 [−0.000051, +0.000163] nats, may differ by 0.00065: pass`."""
    if check.difference is None or check.ci95 is None or check.value is None or check.limit is None:
        return f"{check.name}: undecided, {check.reason}"
    ends = list(check.ci95)
    if check.name == "loss":
        told = difference_text("served_loss", check.difference, ends)
        text = f"loss {told} a token, may differ by {significant(check.limit, 2)}"
    elif check.name == "rows":
        value, floor, limit = (significant(number, 2) for number in (check.value, check.floor or 0.0, check.limit))
        text = f"rows off by {value} nats a token, the floor's by {floor}, may be {limit}"
    else:
        told = difference_text("served_answers_equal", check.difference, ends)
        text = (
            f"{100 * check.value:.1f} % of the answers changed, {100 * (check.floor or 0.0):.1f} % of the floor's "
            f"({told}), may be {100 * check.limit:.1f} points more"
        )
    return f"{text}: {check.outcome}"


def arm_text(slug: str, arm: Mapping[str, Any]) -> str:
    """One sentence of an arm: verdict, figures, and the checks that did not pass."""
    loss, equal = arm["metrics"]["served_loss"], arm["metrics"]["served_answers_equal"]
    parts = [f"{slug}: {arm['verdict']}"]
    apart = arm["differences"]["served_loss"]
    if loss["value"] is not None and apart["difference"] is not None:
        told = difference_text("served_loss", apart["difference"], apart["ci95"])
        parts.append(f"loss {significant(loss['value'], 4)} in {arm['engine']}, served − own {told} a token")
    if equal["value"] is not None:
        parts.append(f"{round(equal['value'] * equal['n']):,} of {equal['n']:,} answers equal")
    if (cut := arm["metrics"]["served_truncated"])["value"]:
        parts.append(f"{round(cut['value'] * cut['n']):,} have no end and score 0")
    parts += [check["text"] for check in arm["checks"] if check["outcome"] != "pass"]
    return "; ".join(parts) + "."


def sentences(section: Mapping[str, Any]) -> Iterator[str]:
    """All of `served` in words: each arm, the floor, who is fastest, and what was not served."""
    arms = section["arms"]
    yield from (arm_text(slug, arm) for slug, arm in arms.items())
    if arms and section["floor"]["reason"]:
        yield f"Judged by the loss alone, without a floor: {section['floor']['reason']}."
    elif arms:
        yield f"The floor is {section['floor']['arm']}: what two engines differ by where nothing is quantized."
    if told := fastest(arms):
        yield told
    yield from not_served_text(section)


def fastest(arms: Mapping[str, Any]) -> str | None:
    """The arms in the first place, with their rate."""
    first = [slug for slug, arm in arms.items() if arm["rank"] == 1]
    if not first or len(arms) < 2:
        return None
    load = at_most(arms[first[0]]["loads"])
    assert load is not None  # a rank rests on it
    rates = [value_text(OUTPUT, line[OUTPUT]["value"]) for slug in first if (line := at_most(arms[slug]["loads"]))]
    shared = "the same within their intervals: " if len(first) > 1 else ""
    named = ", ".join(f"{slug} ({rate} tokens/s)" for slug, rate in zip(first, rates, strict=True))
    return f"Fastest at {load['requests']} requests: {shared}{named}."


def not_served_text(section: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each reason, with the arms that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for slug, reason in section["not_served"].items():
        by_reason.setdefault(reason.rstrip("."), []).append(slug)
    for reason, slugs in by_reason.items():
        where = "" if section["arms"] or len(by_reason) > 1 else " here"
        yield f"Not served{where}: {', '.join(slugs)}: {reason}."
