"""docs/results/served.md of what `python -m tests.bench.served` found."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

BF16 = "bf16"
WIDTH = 118
# Nats a token, of a fine-tuned model. Tried by hand on the quickstart's: the two engines were 0.00001 to 0.00008 apart;
# what 4 bits cost there was 0.0017 to 0.0054. A base that was not fine-tuned has a larger loss and may miss it by the
# rounding of bf16 alone; the page says by how much, and of which model.
LIMIT = 0.0005


def differs(result: Mapping[str, Any]) -> str | None:
    """In what the engine does otherwise than the table says; None where it does the same, or nothing was tried."""
    if result["state"] == "not made":
        return None
    if result["state"] in ("served", "answers") and result["table"] is not None:
        return "the table says it is refused"
    if result["state"] == "refused" and result["table"] is None:
        return "the table says it is read"
    if result["state"] == "served" and abs(result["served_loss"] - result["loss"]) > LIMIT:
        return f"the loss differs by more than {LIMIT:g}"
    return None


def page(conditions: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    return "\n".join(
        [
            "<!-- Written by `python -m tests.bench.served` from served.json. -->",
            "# Served, measured",
            "",
            *_what(conditions),
            "",
            *_verdict(results),
            "",
            "## Loaded and answered",
            "",
            *_served(results),
            "",
            "## Refused",
            "",
            *_refused(conditions, results),
            "",
            _where(conditions, {result["rows"] for result in results.values() if "rows" in result}),
            "",
        ]
    )


def _what(conditions: Mapping[str, Any]) -> Iterator[str]:
    name = conditions["model"]
    yield from textwrap.wrap(
        f"{name[0].upper()}{name[1:]}, quantized by every scheme that the table of engines says vLLM reads on this "
        f"machine, and loaded by vLLM {conditions['vllm']}. What the table says is refused was given to the engine, "
        "too: one scheme for each format, bits, zero points, activation order, and groups or none. `loss` is of the "
        "same rows, in transformers and as the engine says through `prompt_logprobs`; they agree where they are at "
        f"most {LIMIT:g} nats a token apart. A base that was not fine-tuned has a large loss, and bf16's rounding "
        "alone may then be more. Tokens a second are those of all answers, prompts included, with 8 requests at once "
        f"of {conditions['prompt_tokens']} "
        f"tokens and {conditions['new_tokens']} new ones: medians of {conditions['repeats']}.",
        width=WIDTH,
    )
    if conditions["device"] != "cpu":
        return
    yield ""
    if "avx512f" in conditions["flags"]:
        text = "On a CPU vLLM multiplies by 4-bit weights alone: the rest is refused."
    else:
        text = (
            "**This CPU has no AVX-512.** vLLM's kernel for 4-bit weights on a CPU is built for AVX-512 alone, so bf16 "
            "is served here and no scheme is. On a machine with AVX-512 the same command serves those of 4 bits, on "
            "one with a GPU all of the table."
        )
    yield from textwrap.wrap(f"{text} Nothing on this page was tried on a GPU.", width=WIDTH)


def _verdict(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    made = {slug: result for slug, result in results.items() if result["state"] != "not made"}
    unequal = {slug: why for slug, result in made.items() if (why := differs(result))}
    if not unequal:
        yield f"**What the table says and what the engine does differ in none of {len(made)} schemes.**"
    else:
        yield f"**What the table says and what the engine does differ in {len(unequal)} of {len(made)} schemes:** " + (
            "; ".join(f"{slug} ({why})" for slug, why in unequal.items()) + "."
        )


def _served(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    columns = ["scheme", "kernel", "loss, transformers", "loss, vLLM", "apart", "answers equal", "tokens/s"]
    yield f"| {' | '.join([*columns, 'start, s', 'memory, GiB'])} |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for slug, result in results.items():
        if result["state"] != "served":
            continue
        own, there = result["loss"], result["served_loss"]
        rates = next(load["output_tokens_per_s"] for load in result["loads"] if load["requests"] == 8)
        memory = "" if result["resident_gib"] is None else f"{result['resident_gib']:.2f}"
        cells = [slug, result["kernel"] or "none: bf16", f"{own:.5f}", f"{there:.5f}", f"{there - own:+.5f}"]
        cells += [
            f"{result['served_answers_equal']:.3f}",
            f"{statistics.median(rates):.0f}",
            f"{result['start_s']:.0f}",
            memory,
        ]
        yield f"| {' | '.join(cells)} |"


def _refused(conditions: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| scheme | the table of engines | the engine's own words |"
    yield "| --- | --- | --- |"
    for slug, result in results.items():
        if result["state"] == "served":
            continue
        words = result.get("words", "none: it answers").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
        if "initialization failed" in words:
            words += " (What failed was not kept: that it is the table's reason is not shown.)"
        own = f"not made here: {words}" if result["state"] == "not made" else words
        table = result["table"] or f"read by vLLM {conditions['vllm']}"
        yield f"| {slug} | {table} | {own} |"


def _where(conditions: Mapping[str, Any], rows: set[int]) -> str:
    engine = ", ".join(f"{name} {version}" for name, version in conditions["engine"].items())
    own = ", ".join(f"{name} {version}" for name, version in conditions["own"].items())
    gpus = f"; {', '.join(conditions['gpus'])}" if conditions["gpus"] else ""
    text = (
        f"{conditions['cpu']} ({', '.join(conditions['flags']) or 'no vector extensions named'}), "
        f"{conditions['cores']} cores, {conditions['memory_gib']} GiB{gpus}. vLLM {conditions['vllm']} with {engine}; "
        f"here {own}. Rows: {' or '.join(map(str, sorted(rows)))}, test of the first {conditions['lines']} of the "
        f"quickstart's data; seed {conditions['seed']}."
    )
    return "\n".join(textwrap.wrap(text, width=WIDTH))
