"""The section of dev: for tuning. Its figures stand in tables of their own, never beside those of test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flows.report.tables import cell_text, markdown_table
from flows.results.dev import LOSS
from flows.results.metrics import METRICS, absent_text, difference_text

HEADING = "On dev: for tuning; nothing here was promoted by"


class Line(NamedTuple):
    """An arm's row: its cells in the order of `metrics`, then its differences in that order."""

    arm: str
    against: str | None
    cells: list[Mapping[str, Any]]
    differences: list[Mapping[str, Any]]


def metrics(dev: Mapping[str, Any]) -> list[str]:
    """The metrics of the section, task scores first."""
    return list(next(iter(dev["arms"].values()))["metrics"])


def head(metric: str) -> str:
    """`task % ↑`: label, unit and the better direction."""
    return "loss ↓" if metric == LOSS.name else f"{label(metric)} % ↑"


def label(metric: str) -> str:
    """Its name in a heading."""
    return LOSS.label if metric == LOSS.name else METRICS[metric].label


def rows_of(dev: Mapping[str, Any]) -> list[Line]:
    """The table, one line for each arm."""
    return [
        Line(slug, arm["against"], list(arm["metrics"].values()), list(arm["differences"].values()))
        for slug, arm in dev["arms"].items()
    ]


def lead(dev: Mapping[str, Any]) -> str:
    """What the figures are and are not for."""
    size = f"{dev['rows']:,} rows in {dev['groups']:,} groups, {dev['tokens']:,} tokens of dev"
    return (
        f"{size}. Look at them as often as you like: they choose checkpoint, merge and candidate, and tuning belongs "
        "here. Whether the candidate is promoted is decided on test, by none of these figures. Difference = arm − "
        f"merged model, paired; intervals hold together over all {dev['family_size']}, and the word is about the arm."
    )


def difference(metric: str, one: Mapping[str, Any]) -> str:
    """`+0.3 [−1.0, +1.6] points, no difference shown`; a dash, or `not decoded`, where there is none."""
    if one["difference"] is None:
        return absent_text(one["reason"])
    unit = " nats" if metric == LOSS.name else ""
    return f"{difference_text(metric, one['difference'], one['ci95_adjusted'])}{unit}, {one['verdict']}"


def reasons(dev: Mapping[str, Any]) -> list[str]:
    """Why cells and differences are empty, a sentence for each reason."""
    found: dict[str, list[str]] = {}
    for slug, arm in dev["arms"].items():
        for one in (*arm["metrics"].values(), *arm["differences"].values()):
            if one["reason"] and slug not in found.setdefault(one["reason"], []):
                found[one["reason"]].append(slug)
    return [f"Not there: {', '.join(arms)}: {reason}." for reason, arms in found.items()]


def dev_section(dev: Mapping[str, Any] | None) -> Iterator[str]:
    """The section in Markdown; nothing where no arm has scores of dev."""
    if not dev:
        return
    names = metrics(dev)
    yield from [f"## {HEADING}", "", lead(dev), ""]
    yield from markdown_table(
        ["arm", *map(head, names)], [[line.arm, *map(cell_text, names, line.cells)] for line in rows_of(dev)]
    )
    compared = [line for line in rows_of(dev) if line.differences]
    if compared:
        yield ""
        yield from markdown_table(
            ["arm / merged", *(f"{label(name)}, difference" for name in names)],
            [[f"{line.arm} / {line.against}", *map(difference, names, line.differences)] for line in compared],
        )
    for line in reasons(dev):
        yield f"\n{line}"
    yield ""
