"""Which layers suffer, drawn: errors by layer, and the variance of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flows.report.plots.style import INK, MUTED, STYLE, WIDTH_IN, as_svg, look, plain_axes
from flows.results.layers import PARTS, Line, lines, part_of
from flows.results.metrics import significant

LABEL_PT, LETTER_PT = 11.0, 5.2  # least distance of two labels; width of a letter of theirs


def errors_plot(layers: Mapping[str, Any]) -> str:
    """SVG: relative error by decoder layer, attention and FFN side by side, one line per scheme."""
    by_part = {part: list(lines(layers, part)) for part in PARTS}
    if not any(by_part.values()):
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.6), dpi=72)
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        room = LETTER_PT * max(len(line.slug) for some in by_part.values() for line in some) + 14
        figure.subplots_adjust(left=0.14, right=1 - room / (72 * WIDTH_IN), bottom=0.14, top=0.92, wspace=0.08)
        for axes, part in ((left, PARTS[0]), (right, PARTS[1])):
            axes.set_yscale("log")
            plain_axes(axes, x="decoder layer", y="relative error" if axes is left else "")
            axes.set_title(part, fontsize=10, color=INK, loc="left")
            for line in by_part[part]:
                _draw(axes, line)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{significant(100 * value, 1)} %"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        canvas.draw()
        _label(figure, right, by_part[PARTS[1]] or by_part[PARTS[0]])
        return as_svg(figure, "Relative error of attention and FFN by decoder layer, one line a scheme")


def weights_plot(layers: Mapping[str, Any]) -> str:
    """SVG: root mean square of the weights by decoder layer, attention against FFN, before quantization."""
    merged = next((layer for slug, layer in layers.items() if not slug.endswith(".on-base")), None)
    if merged is None:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.6), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for part, dash in zip(PARTS, ("-", (0, (4, 2))), strict=True):
            spread = {block["layer"]: block["weight_std"] for block in merged["blocks"] if part_of(block) == part}
            axes.plot(list(spread), list(spread.values()), color=INK, linestyle=dash, marker="o", markersize=3.5)
            last = max(spread, default=0)
            if spread:
                place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "color": INK}
                axes.annotate(part, (last, spread[last]), annotation_clip=False, **place)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        plain_axes(axes, x="decoder layer", y="root mean square of weights")
        return as_svg(figure, "Root mean square of attention and FFN weights by decoder layer")


def _draw(axes: Axes, line: Line) -> None:
    colour, marker, filled = look(line.slug)
    axes.plot(
        list(line.errors),
        list(line.errors.values()),
        color=colour,
        marker=marker,
        markersize=3.5,
        markerfacecolor=colour if filled else "none",
        linewidth=1.4,
        linestyle="-" if line.measured else (0, (4, 2)),
    )


def _label(figure: Figure, axes: Axes, drawn: list[Line]) -> None:
    """Write slugs in the right margin, at the ends of their lines, the upper pushed up where two would overlap."""
    ends = [(line, axes.transData.transform((max(line.errors), line.errors[max(line.errors)]))) for line in drawn]
    edge, lowest = axes.get_window_extent().x1 + 6, -1e9
    for line, (x, y) in sorted(ends, key=lambda end: end[1][1]):
        lowest = max(float(y), lowest + LABEL_PT)
        axes.annotate(
            line.slug,
            (float(x), float(y)),
            xytext=(edge, lowest),
            xycoords="figure points",
            textcoords="figure points",
            annotation_clip=False,
            color=INK,
            va="center",
            fontsize=9,
            arrowprops={
                "arrowstyle": "-",
                "color": MUTED,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
