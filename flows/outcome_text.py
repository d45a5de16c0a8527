"""What the report's later parts say in words: the gate, the waterfall, how many rows would tell, what fits a GPU.

The parts (`gate`, `waterfall`, `power`, `fit` of report.json) may be missing: then nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flows.metrics import METRICS, difference_text, significant
from flows.plot_waterfall import signed

GATE_MARKS = {"pass": "✓", "worse": "▼", "undecided": "?", "none": "–"}


def label(metric: str) -> str:
    """A metric as a column is headed; metrics of the gate alone as they are written."""
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")


def is_share(metric: str) -> bool:
    """Shares are told in points, everything else that the gate looks at in nats."""
    return metric.split(".")[0].split("@")[0] in ("task", "top1_agreement")


def test_difference(test: Mapping[str, Any]) -> str:
    """`-0.4 [-1.3, +0.5] points` of one test of the gate; its reason where it could not be made."""
    if test["difference"] is None or test["ci95"] is None:
        return test.get("reason") or "could not be made"
    return difference_text("task" if is_share(test["metric"]) else "kl_mean", test["difference"], test["ci95"])


def margin_text(test: Mapping[str, Any]) -> str:
    """What may be lost: `2 points`, `0.02 nats`; a margin of zero has to be beaten."""
    if not test["margin"]:
        return "better than it"
    margin = abs(test["margin"])
    return f"{100 * margin:g} points" if is_share(test["metric"]) else f"{margin:g} nats"


def gate_sentence(gate: Mapping[str, Any] | None) -> str | None:
    """The outcome in one sentence, with the test that decided."""
    if not gate:
        return None
    candidate, outcome = gate["candidate"], gate["outcome"]
    if candidate is None or outcome == "none":
        return f"The gate judged nothing: {(gate['reason'] or 'the run names no candidate').rstrip('.')}."
    tests = [*gate["tests"], *(one for one in gate["domains"] if one["gates"])]
    if outcome == "pass":
        against = " and ".join(dict.fromkeys(one["against"] for one in tests))
        return f"{candidate} passes the gate: within every margin of {len(tests)} tests against {against}."
    deciding = next((one for one in tests if one["outcome"] == outcome), None)
    if deciding is None:
        return f"{candidate} does not pass the gate: {outcome}."
    where = f" in {deciding['domain']}" if deciding.get("domain") else ""
    told = f"{label(deciding['metric'])}{where} {test_difference(deciding)} against {deciding['against']}"
    limit = f"margin {margin_text(deciding)}"
    if outcome == "worse":
        return f"{candidate} does not pass the gate: {told}, {limit}."
    needed = deciding["n_needed"]
    more = f"; about {needed:,} rows would decide, {deciding['n']:,} are there" if needed else ""
    return f"The gate is undecided about {candidate}: {told}, {limit}{more}."


def waterfall_sentence(waterfall: Mapping[str, Any] | None) -> str | None:
    """Where the loss of the shortest-of-all path goes: the arm that loses least, step by step."""
    whole = [path for path in (waterfall or {}).get("paths", []) if path["steps"] and not path.get("reason")]
    if not waterfall or not whole:
        return None
    path = min(whole, key=lambda one: sum(step["difference"] for step in one["steps"]))
    steps = ", ".join(
        f"{step['step']} {signed(step['difference'], step['ci95_adjusted'])} ({step['verdict']})"
        for step in path["steps"]
    )
    total = sum(step["difference"] for step in path["steps"])
    start = path["steps"][0]["from"]
    return (
        f"{path['arm']} loses least against {start}: {significant(total, 2)} {waterfall['unit']} on "
        f"{waterfall['split']} ({steps})."
    )


def fit_sentences(fit: Mapping[str, Any] | None) -> Iterator[str]:
    """The best arm for each GPU size that was computed."""
    for one in (fit or {}).get("examples", []):
        best = one["best"] or "nothing of this run"
        yield f"{one['vram_gib']:g} GiB, {one['batch']} x {one['context']:,} tokens: {best}"
