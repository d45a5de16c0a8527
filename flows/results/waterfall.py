"""Where the loss went: nf4-adapter -> chosen merge -> weights -> KV cache, in mean loss per token of test.

Every bar is a difference of two means over the same tokens, so the bars of a path add up to its whole. Base in bf16
against base in NF4, what QLoRA trains on, is a bar of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flows.results.cells import ArmEvidence
from flows.results.comparisons import REFERENCE, verdict
from flows.results.paired import OTHER_DEVICE, Draw, Paired, differences, few_groups
from flows.results.read import RunArm
from flows.results.rows import RowScores

BASES = ("base", "base-nf4")


class Bar(NamedTuple):
    """One step between two arms: what changed, and between which."""

    step: str
    before: str
    after: str


class Path(NamedTuple):
    """All bars that lead to an arm, and why there are no more; None where they reach it."""

    arm: str
    bars: tuple[Bar, ...]
    reason: str | None


def waterfall(evidence: Mapping[str, ArmEvidence], draws: Draw) -> dict[str, Any] | None:
    """`waterfall` of report.json; None where the reference has no losses on test.

    Args:
        evidence: Every arm of the run.
        draws: The resamples of some groups. All bars share them; their adjusted intervals are one family.
    """
    if REFERENCE not in evidence or "nll" not in evidence[REFERENCE].scores:
        return None
    reference = evidence[REFERENCE].scores["nll"]
    obstacles = {slug: _obstacle(arm, reference) for slug, arm in evidence.items()}
    paths = [_cut(slug, bars, obstacles) for slug, bars in _chains([arm.arm for arm in evidence.values()])]
    nf4 = Bar("nf4", *BASES)
    beside = [nf4] if all(slug in obstacles and obstacles[slug] is None for slug in BASES) else []
    losses = {slug: evidence[slug].scores["nll"] for slug, why in obstacles.items() if why is None}
    steps = _steps(dict.fromkeys([*(bar for path in paths for bar in path.bars), *beside]), losses, draws)
    return {
        "unit": "nats a token",
        "split": "test",
        "tokens": reference.n,
        "rows": len(reference.rows),
        "groups": len(reference.groups),
        "paths": [
            {
                "arm": path.arm,
                "losses": {slug: losses[slug].sums.value for slug in _stops(path.bars)},
                "steps": [steps[bar] for bar in path.bars],
                "reason": path.reason,
            }
            for path in paths
        ],
        "base": {**steps[nf4], "losses": {slug: losses[slug].sums.value for slug in BASES}} if beside else None,
    }


def _obstacle(arm: ArmEvidence, reference: RowScores) -> str | None:
    """Why an arm's loss cannot be a stop on the way."""
    rows = arm.scores.get("nll")
    if rows is None:
        return arm.failure or "no losses on test"
    if not rows.same_device(reference):
        return f"{OTHER_DEVICE} than {REFERENCE}"
    if not rows.same_rows(reference):
        return f"its losses are of other rows or tokens than {REFERENCE}'s"
    if not rows.finite:
        return "losses that are not finite"
    return few_groups(rows)


def _chains(arms: Sequence[RunArm]) -> Iterator[tuple[str, list[Bar]]]:
    """Each arm that may be shipped quantized, with every bar from the reference to it."""
    known = {arm.slug: arm for arm in arms}
    for arm in arms:
        shipped = arm.kv is not None or (arm.scheme is not None and not arm.on_base)
        if not shipped or arm.is_control:
            continue
        bars: list[Bar] = []
        slug = arm.slug
        while slug in known and (bar := _last(known[slug])):
            bars.insert(0, bar)
            slug = bar.before
        if bars and bars[0].before == REFERENCE:
            yield arm.slug, bars


def _last(arm: RunArm) -> Bar | None:
    """The bar that ends at an arm; None at the reference and at what does not come from it."""
    if arm.kv is not None and arm.of is not None:
        return Bar("kv-cache", arm.of, arm.slug)
    if arm.scheme is not None:
        return Bar("weights", REFERENCE if arm.on_base else f"merged-{arm.merge_base}", arm.slug)
    return Bar("merge", REFERENCE, arm.slug) if arm.merge_base is not None else None


def _cut(slug: str, bars: Sequence[Bar], obstacles: Mapping[str, str | None]) -> Path:
    """The bars before the first arm that has no loss."""
    for index, stop in enumerate(_stops(bars)):
        if (why := obstacles.get(stop, "no such arm")) is not None:
            return Path(slug, tuple(bars[: max(0, index - 1)]), f"{stop}: {why}")
    return Path(slug, tuple(bars), None)


def _stops(bars: Sequence[Bar]) -> list[str]:
    return [*(bar.before for bar in bars[:1]), *(bar.after for bar in bars)]


def _steps(bars: Iterable[Bar], losses: Mapping[str, RowScores], draws: Draw) -> dict[Bar, dict[str, Any]]:
    """Every bar with its intervals; after - before, so that a loss that rose is positive."""
    ordered = list(bars)
    found = differences([Paired(losses[bar.after], losses[bar.before]) for bar in ordered], draws)
    return {
        bar: {
            "step": bar.step,
            "from": bar.before,
            "to": bar.after,
            "difference": difference.estimate,
            "ci95": list(difference.ci95),
            "ci95_adjusted": list(difference.ci95_adjusted),
            "family_size": len(ordered),
            "verdict": verdict("ppl_test", difference.ci95_adjusted),  # of the same loss: lower is better
        }
        for bar, difference in zip(ordered, found, strict=True)
    }
