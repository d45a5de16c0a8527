"""The chain: how far each version, and the candidate, is from the best one, with the line that may not be crossed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.report.chain import chain_lines, margin_of
from flows.report.plots.style import BAD, INK, MUTED, PAPER, STYLE, WIDTH_IN, as_svg, plain_axes

ROW_IN, AROUND_IN = 0.25, 0.85  # height of a line; of axis and margins


def chain_plot(gate: Mapping[str, Any] | None) -> str:
    """SVG: a mark a version with its interval, the margin dashed; nothing with fewer than two differences."""
    lines = [line for line in chain_lines(gate) if line.difference is not None]
    if not gate or len(lines) < 2:
        return ""
    task = gate["chain"]["metric"] == "task"
    scale, unit = (100.0, "points of the task score") if task else (1.0, "bits a byte")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, ROW_IN * len(lines) + AROUND_IN), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for row, line in enumerate(lines):
            at = scale * (line.difference or 0.0)
            if line.ci95:
                axes.plot([scale * end for end in line.ci95], [row, row], color=INK, linewidth=1.1)
            filled = line.name != "candidate"
            axes.plot(at, row, "o", color=INK, markerfacecolor=INK if filled else PAPER, markersize=5)
        axes.axvline(0, color=MUTED, linewidth=1)
        if margin := margin_of(gate):
            axes.axvline(scale * margin[0], color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=9)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        plain_axes(axes, x=f"difference to the best version, {unit}", y="")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", colors=INK)
        return as_svg(figure, "The chain of versions: difference of each to the best one, with intervals")
