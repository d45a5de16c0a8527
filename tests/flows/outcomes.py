"""Parts of report.json as the gate, the waterfall, the power and the fit of a run leave them, with made-up figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flows.gate.checks import Check, Outcome
from flows.gate.section import sentences
from flows.results.stats import Interval


def step(step: str, before: str, after: str, difference: float, half: float) -> dict[str, Any]:
    """One bar of a waterfall; the word follows from the interval."""
    low, high = difference - half, difference + half
    word = "no difference shown" if low <= 0 <= high else "worse" if low > 0 else "better"
    return {
        "step": step,
        "from": before,
        "to": after,
        "difference": difference,
        "ci95": [low + half / 10, high - half / 10],
        "ci95_adjusted": [low, high],
        "family_size": 5,
        "verdict": word,
    }


def waterfall() -> dict[str, Any]:
    """Two schemes on one merge, one of them with an FP8 cache on top, and NF4 of the base."""
    merge = step("merge", "nf4-adapter", "merged-dequantized", 0.00002, 0.0001)
    gptq = step("weights", "merged-dequantized", "gptq-w4-g128", 0.0011, 0.0005)
    cache = step("kv-cache", "gptq-w4-g128", "gptq-w4-g128.kv-fp8", 0.0006, 0.0009)
    awq = step("weights", "merged-dequantized", "awq-w4-g128", 0.0031, 0.0011)
    loss = {"nf4-adapter": 0.0850, "merged-dequantized": 0.08502}
    loss |= {"gptq-w4-g128": 0.08612, "gptq-w4-g128.kv-fp8": 0.08672, "awq-w4-g128": 0.08812}

    def path(arm: str, *steps: dict[str, Any]) -> dict[str, Any]:
        stops = [steps[0]["from"], *(one["to"] for one in steps)]
        return {"arm": arm, "losses": {slug: loss[slug] for slug in stops}, "steps": list(steps), "reason": None}

    return {
        "unit": "nats a token",
        "split": "test",
        "tokens": 10_240,
        "rows": 400,
        "groups": 200,
        "paths": [
            path("gptq-w4-g128", merge, gptq),
            path("gptq-w4-g128.kv-fp8", merge, gptq, cache),
            path("awq-w4-g128", merge, awq),
        ],
        "base": step("nf4", "base", "base-nf4", 0.021, 0.006),
    }


def power() -> list[dict[str, Any]]:
    """One scheme that was planned, and one that could not be."""
    plan = {"metric": "task", "loss": 0.03, "power": 0.8, "against": "merged-dequantized", "rows": 400, "groups": 200}
    return [
        {**plan, "arm": "gptq-w4-g128", "rows_needed": 612, "groups_needed": 306, "reason": None},
        {**plan, "arm": "awq-w4-g128", "rows_needed": None, "groups_needed": None, "reason": "no task scores"},
    ]


def gate(outcome: Outcome = "undecided") -> dict[str, Any]:
    """A candidate whose task check has the given outcome; loss and base pass, a slice of 57 rows is only shown."""
    difference, ci95 = {
        "pass": (-0.002, Interval(-0.009, 0.005)),
        "worse": (-0.08, Interval(-0.11, -0.05)),
        "undecided": (-0.012, Interval(-0.031, 0.007)),
    }[outcome]
    task = Check(
        metric="task",
        against="merged-dequantized",
        margin=0.02,
        unit="share",
        outcome=outcome,
        difference=difference,
        ci95=ci95,
        ci95_adjusted=ci95,
        n=400,
        n_needed=1_900 if outcome == "undecided" else None,
    )
    even = Interval(0.0006, 0.0016)
    loss = replace(task, metric="loss", unit="nats", difference=0.0011, ci95=even, outcome="pass", n_needed=None)
    bits = replace(loss, metric="bits_per_byte", unit="bits", against="champion", margin=0.006)
    won = Interval(0.85, 0.91)
    beaten = replace(loss, metric="task", unit="share", against="base", margin=0.0, difference=0.88, ci95=won)
    slice_ = replace(task, domain="join", gates=False, n=57, outcome="undecided")
    made = {
        "candidate": "gptq-w4-g128",
        "reason": "fewest bytes of the arms that are no worse on dev",
        "left_out": {},
        "outcome": outcome,
        "tests": [one.as_dict() for one in (task, loss, beaten, bits)],
        "domains": [slice_.as_dict()],
        "champion": None,
    }
    return {**made, "text": list(sentences(made))}


def no_gate() -> dict[str, Any]:
    """No candidate."""
    made = {"candidate": None, "reason": "no scheme of this run is fit for it", "outcome": "none", "tests": []}
    made |= {"domains": [], "champion": None, "left_out": {"gptq-w4-g128": "vLLM does not read it."}}
    return {**made, "text": list(sentences(made))}


def fit() -> dict[str, Any]:
    """Two arms, of which one is on the front, and two sizes of GPU."""
    return {
        "kv_bytes_per_token": {"bf16": 3072, "fp8": 1536, "int8": 1584},
        "arms": [
            {"arm": "gptq-w4-g128", "weights_bytes": 4_716_000, "task": 0.895, "kl_mean": 5.4e-4, "on_front": True}
            | {"refused": None},
            {"arm": "awq-w4-g128", "weights_bytes": 4_716_000, "task": 0.9, "kl_mean": 1.45e-3, "on_front": False}
            | {"refused": "vLLM does not read it"},
        ],
        "examples": [
            {"vram_gib": 8, "context": 4096, "batch": 8, "best": "gptq-w4-g128"},
            {"vram_gib": 24, "context": 131_072, "batch": 64, "best": None},
        ],
        "reason": None,
    }


def all_of_them() -> dict[str, Any]:
    """The four keys of report.json."""
    return {"waterfall": waterfall(), "power": power(), "gate": gate(), "fit": fit()}
