"""Tokens a second of a real engine against requests at once, one line an arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import IdentityTransform

from flows.report.plots.style import INK, PAPER, STYLE, WIDTH_IN, as_svg, look, plain_axes
from flows.results.metrics import significant
from flows.results.throughput import OUTPUT

LABEL_PT = 13.0  # between two names that would cover each other
HEIGHT_IN = 3.2
FRAME = (0.15, 0.14, 0.46, 0.82)  # of the figure: the names stand at the right, and a long slug takes a third


def throughput_plot(served: Mapping[str, Any] | None) -> str:
    """SVG: tokens of answers a second, all requests together, with intervals; both axes logarithmic.

    Nothing where no arm was timed.
    """
    lines = {slug: points for slug, arm in (served or {"arms": {}})["arms"].items() if (points := _points(arm))}
    if not lines:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=72)
        FigureCanvasAgg(figure)
        axes = figure.add_axes(FRAME)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for slug, points in lines.items():
            _draw(axes, slug, points)
        loads = sorted({point["requests"] for points in lines.values() for point in points})
        axes.set_xlim(loads[0] / 1.3, loads[-1] * 1.3)
        plain_axes(axes, x="requests at once", y="output tokens a second, all requests")
        axes.xaxis.set_major_locator(FixedLocator(loads))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 1)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _name(axes, lines)
        return as_svg(figure, "Decoded tokens a second against requests at once, one line an arm, with 95 % intervals")


def _points(arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arm's loads that were timed well enough, by requests."""
    return [{"requests": load["requests"], **load[OUTPUT]} for load in arm["loads"] if load[OUTPUT]["value"]]


def _draw(axes: Axes, slug: str, points: list[dict[str, Any]]) -> None:
    colour, marker, filled = look(slug)
    at = [point["requests"] for point in points]
    axes.plot(
        at,
        [point["value"] for point in points],
        color=colour,
        marker=marker,
        markerfacecolor=colour if filled else PAPER,
        markersize=6,
        linewidth=1.4,
    )
    for point in points:
        if point["ci95"]:
            axes.plot([point["requests"]] * 2, point["ci95"], color=colour, linewidth=1.6, solid_capstyle="round")


def _name(axes: Axes, lines: Mapping[str, list[dict[str, Any]]]) -> None:
    """Names at the right, beside the lines' ends, moved apart where they would cover each other."""
    last = {slug: points[-1] for slug, points in lines.items()}
    ends = {slug: axes.transData.transform((end["requests"], end["value"])) for slug, end in last.items()}
    height, left = float(axes.bbox.y1) + LABEL_PT, float(axes.bbox.x1) + 10
    for slug in sorted(ends, key=lambda slug: -float(ends[slug][1])):
        height = min(float(ends[slug][1]), height - LABEL_PT)
        colour, marker, filled = look(slug)
        axes.plot(
            left,
            height,
            marker=marker,
            color=colour,
            markerfacecolor=colour if filled else PAPER,
            markersize=5,
            transform=IdentityTransform(),
            clip_on=False,
        )
        axes.annotate(
            slug,
            (left + 7, height - 1),
            xycoords="figure points",
            color=INK,
            va="center",
            annotation_clip=False,
            fontsize=9,
        )
