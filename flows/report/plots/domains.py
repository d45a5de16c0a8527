"""Bars by domain: the task score of what may be shipped, one panel per domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from flows.report.plots.style import INK, PAPER, STYLE, WIDTH_IN, as_svg, look, plain_axes

ROLES = ("reference", "merged", "scheme", "external")
MOST_ARMS, MOST_DOMAINS = 8, 12  # drawn; the table has all
BAR_IN, AROUND_IN = 0.17, 0.36  # height of a bar; of a panel's title and gap


def drawn_arms(report: Mapping[str, Any]) -> list[str]:
    """Ranked arms with task scores by domain, controls and variants left out."""
    return [
        slug
        for slug, arm in report["arms"].items()
        if arm["ranked"] and arm["role"] in ROLES and any(key.startswith("task@") for key in report["domains"][slug])
    ][:MOST_ARMS]


def drawn_domains(report: Mapping[str, Any], arms: Sequence[str]) -> dict[str, int]:
    """Domain -> rows behind it, the largest ones, by falling size."""
    cells: Mapping[str, Any] = report["domains"][arms[0]] if arms else {}
    rows = {key.removeprefix("task@"): cell["n"] or 0 for key, cell in cells.items() if key.startswith("task@")}
    return dict(sorted(rows.items(), key=lambda domain: (-domain[1], domain[0]))[:MOST_DOMAINS])


def domains_plot(report: Mapping[str, Any]) -> str:
    """SVG: one panel per domain, one bar per arm, with 95 % intervals; nothing with fewer than two domains."""
    arms = drawn_arms(report)
    domains = drawn_domains(report, arms)
    if len(domains) < 2:
        return ""
    lines = -(-len(domains) // 2)
    with mpl.rc_context(STYLE):
        size = (WIDTH_IN, lines * (BAR_IN * len(arms) + AROUND_IN) + 0.45)
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, 2, sharex=True, squeeze=False)
        for index, panel in enumerate(panels.flat):
            if index >= len(domains):
                panel.set_visible(False)
                continue
            name = list(domains)[index]
            _panel(panel, [(slug, report["domains"][slug].get(f"task@{name}")) for slug in arms])
            panel.set_title(f"{name or '(none)'}, {domains[name]} rows", fontsize=9, color=INK, loc="left", pad=3)
            bottom = index + 2 >= len(domains)
            plain_axes(panel, x="task score, %" if bottom else "", y="")
            panel.tick_params(axis="x", labelbottom=bottom)
            panel.grid(visible=False, axis="y")
            panel.set_yticks(range(len(arms)), arms if index % 2 == 0 else [""] * len(arms), fontsize=9)
            panel.tick_params(axis="y", colors=INK)
        return as_svg(figure, "Task score by domain, a bar an arm, with 95 % intervals")


def _panel(axes: Axes, cells: Sequence[tuple[str, Mapping[str, Any] | None]]) -> None:
    for row, (slug, cell) in enumerate(cells):
        if cell is None or cell["value"] is None:
            continue
        colour, _, filled = look(slug)
        axes.barh(
            row, 100 * cell["value"], height=0.66, color=colour if filled else PAPER, edgecolor=colour, linewidth=1
        )
        if cell["ci95"]:
            axes.plot([100 * end for end in cell["ci95"]], [row, row], color=INK, linewidth=1.1)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.xaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
