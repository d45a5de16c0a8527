"""What fits which card, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

FIT_RULE = "the lowest KL to the reference among the arms that fit, then the fewest bytes"


def fit_section(fit: Mapping[str, Any]) -> Iterator[str]:
    """The report's section, in Markdown."""
    yield from ["## What fits where", ""]
    if fit["reason"]:
        yield from [f"Cannot be computed: {fit['reason']}.", ""]
        return
    first, tokens = fit["examples"][0], fit["kv_bytes_per_token"]
    each = ", ".join(f"{tokens[name] / 1024:.4g} KiB as {name}" for name in tokens)
    yield f"A token of KV cache takes {each}. For {first['batch']} sequences of {first['context']:,} tokens on:"
    yield ""
    for example in fit["examples"]:
        yield f"- {card_text(example)}: {example['best'] or 'no arm fits'}"
    yield ""
    ahead = [line["arm"] for line in fit["arms"] if line["on_front"]]
    yield f"On the Pareto front of bytes and KL: {', '.join(ahead) or 'none'}. Best is {FIT_RULE}."
    free = f"{100 * fit['free_share']:.0f} % of each card stays free"
    yield f"{free}; `quench choose` takes other cards and lengths. No GPU has confirmed these sums."
    yield ""


def card_text(*examples: Mapping[str, Any]) -> str:
    """`a card of 24 GiB`, `each of 2 cards of 16, 24 GiB`; examples of one report have as many cards, old ones one."""
    cards = examples[0].get("tensor_parallel", 1)
    sizes = ", ".join(f"{example['vram_gib']:g}" for example in examples)
    return f"{'a card' if cards == 1 else f'each of {cards} cards'} of {sizes} GiB"


def fit_sentences(fit: Mapping[str, Any] | None) -> Iterator[str]:
    """The best arm for each size of card that was computed; sizes with the same one share a line."""
    examples = (fit or {}).get("examples", [])
    for (best, batch, context), cards in groupby(examples, itemgetter("best", "batch", "context")):
        yield f"{card_text(*cards)}, {batch} x {context:,} tokens: {best or 'no arm fits'}"
