"""What arms keep of the gain of fine-tuning, in words and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flows.report.tables import markdown_table
from flows.results.metrics import difference_text, interval_text, value_text

HEAD = ("arm", "of the task score", "of the loss")
METRICS = {"task": ("task", "task score"), "loss": ("kl_mean", "loss")}  # a figure's digits and unit, and its name
TITLE = "How much of the gain is kept?"


def lead(kept: Mapping[str, Any]) -> str:
    """What fine-tuning gained, and what the shares are shares of; or why there are none."""
    told = [_gain(kept[name], metric=metric, label=label) for name, (metric, label) in METRICS.items() if name in kept]
    text = f"From {kept['from']} to {kept['to']}: {'; '.join(told)}."
    if not rows(kept):
        return text
    return (
        f"{text} A share is (arm − {kept['from']}) / ({kept['to']} − {kept['from']}) on the same rows: 100 % is all of "
        "it. Each interval holds at 95 % by itself (Fieller's), and ranks nothing."
    )


def _gain(section: Mapping[str, Any], *, metric: str, label: str) -> str:
    """`task score +12.1 [+9.8, +14.4] points`, with the reason why there is no share of it."""
    if section["gain"] is None:
        return f"{label}: {section['reason']}"
    text = f"{label} {difference_text(metric, section['gain'], section['ci95'])}"
    return f"{text} ({section['reason']})" if section["reason"] else text


def rows(kept: Mapping[str, Any]) -> list[list[str]]:
    """Arm, share of the task score, share of the loss; empty where no gain is shown."""
    arms = dict.fromkeys(slug for name in METRICS for slug in kept.get(name, {}).get("arms", {}))
    return [[slug, *(cell(kept.get(name), slug) for name in METRICS)] for slug in arms]


def cell(section: Mapping[str, Any] | None, slug: str) -> str:
    """`97.2 % [91.0, 103.5]`, or a dash."""
    line = (section or {"arms": {}})["arms"].get(slug)
    if line is None or line["share"] is None:
        return "–"
    text = value_text("task", line["share"], line["ci95"], unit=True)
    return f"{text} {interval_text('task', line['share'], line['ci95'])}"


def reasons(kept: Mapping[str, Any]) -> list[str]:
    """Why an arm has no share, where others have."""
    return [
        f"{slug}, {label}: {line['reason']}."
        for name, (_, label) in METRICS.items()
        for slug, line in kept.get(name, {}).get("arms", {}).items()
        if line["reason"]
    ]


def kept_section(kept: Mapping[str, Any] | None) -> Iterator[str]:
    """The section in Markdown; nothing where the run has none."""
    if not kept:
        return
    yield from ["", f"## {TITLE}", "", lead(kept)]
    if lines := rows(kept):
        yield from ["", *markdown_table(HEAD, lines), *(f"\n{line}" for line in reasons(kept))]
