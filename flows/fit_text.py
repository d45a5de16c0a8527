"""What fits where, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RULE = "the lowest KL to the reference among the arms that fit, then the fewest bytes"


def section(fit: Mapping[str, Any]) -> Iterator[str]:
    """The report's section, in Markdown."""
    yield from ["## What fits where", ""]
    if fit["reason"]:
        yield from [f"Cannot be computed: {fit['reason']}.", ""]
        return
    first, tokens = fit["examples"][0], fit["kv_bytes_per_token"]
    each = ", ".join(f"{tokens[name] / 1024:.4g} KiB as {name}" for name in tokens)
    yield f"A token of KV cache takes {each}. For {first['batch']} sequences of {first['context']:,} tokens:"
    yield ""
    for one in fit["examples"]:
        yield f"- {one['vram_gib']:g} GiB: {one['best'] or 'no arm fits'}"
    yield ""
    ahead = [one["arm"] for one in fit["arms"] if one["on_front"]]
    yield f"On the Pareto front of bytes and KL: {', '.join(ahead) or 'none'}. Best is {RULE}."
    yield f"{100 * fit['free_share']:.0f} % of the card stays free; `quench choose` takes other cards and lengths."
    yield ""


def sentences(fit: Mapping[str, Any] | None) -> Iterator[str]:
    """The best arm for each size of card that was computed; nothing without the part."""
    for one in (fit or {}).get("examples", []):
        best = one["best"] or "no arm fits"
        yield f"{one['vram_gib']:g} GiB, {one['batch']} x {one['context']:,} tokens: {best}"
