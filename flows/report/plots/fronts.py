"""The report's figures, as SVG that takes its colours from the page: readable on light, dark and paper.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; shape and fill say the same again.

`_best_place` is not adjustText 1.4 (tried with iter_lim=500): that put labels over marks and off the frame, took two to
seven times as long for 28 arms, and imports pyplot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flows.report.plots.style import INK, MUTED, PAPER, STYLE, WIDTH_IN, as_svg, look, plain_axes
from flows.results.metrics import significant

SIDE_BY_SIDE_PT = 5.0  # points of equal size are set this far apart


class Box(NamedTuple):
    """A rectangle in points of the figure."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm in a plot."""

    slug: str
    colour: str
    marker: str
    filled: bool
    x: float
    y: float
    low: float
    high: float
    small: bool = False


def _point(slug: str, arm: Mapping[str, Any], metric: str, scale: float = 1.0) -> Point:
    cell = arm["metrics"][metric]
    low, high = cell["ci95"] or (cell["value"], cell["value"])
    colour, marker, filled = look(slug)
    return Point(
        slug=slug,
        colour=colour,
        marker=marker,
        filled=filled,
        x=(arm["metrics"]["size_bytes"]["value"] or 0.0) / 1e6,
        y=cell["value"] * scale,
        low=low * scale,
        high=high * scale,
        small=arm["role"] == "on-base",
    )


NOT_DRAWN = ("base", "control", "kv-cache", "null")  # far off; in their own section; in the waterfall; no other model


def against_size(arms: Mapping[str, Any], metric: Literal["kl_mean", "task"]) -> str:
    """SVG: a metric against size_bytes, with intervals, and the front: points that no other beats in both.

    KL (log axis) leaves the reference out, which is zero by definition. Quantized base + adapter is drawn small and
    hollow, and named only where it is on the front.
    """
    kl = metric == "kl_mean"
    points = [
        _point(slug, arm, metric, 1 if kl else 100)
        for slug, arm in arms.items()
        if arm["ranked"] and arm["role"] not in NOT_DRAWN and _drawable(arm, metric)
    ]
    if not points:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.2), dpi=72, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        floor = min(point.y for point in points) / 10 if kl else 0.0
        _set_limits(axes, points, floor, kl=kl)
        label = "KL to the reference, nats a token" if kl else "task score, % of test answers"
        plain_axes(axes, x="size, MB (what a server fetches)", y=label)
        _ticks(axes, kl)
        canvas.draw()
        figure.set_layout_engine("none")  # labels are placed in the frame as it stands now
        best = front(points, lower=kl)
        axes.step(
            [*(point.x for point in best), axes.get_xlim()[1]],
            [*(point.y for point in best), best[-1].y],
            where="post",
            color=MUTED,
            linewidth=1,
            linestyle=(0, (4, 3)),
            zorder=0,
        )
        _place(axes, canvas, points, floor, {point.slug for point in best})
        what = "KL to the reference" if kl else "Task score"
        return as_svg(figure, f"{what} against size, one point an arm, with 95 % intervals; the front as a line")


def _drawable(arm: Mapping[str, Any], metric: str) -> bool:
    value = arm["metrics"][metric]["value"]
    return value is not None and (metric == "task" or value > 0) and bool(arm["metrics"]["size_bytes"]["value"])


def _set_limits(axes: Axes, points: Sequence[Point], floor: float, *, kl: bool) -> None:
    """Room for every interval, and for labels above and at both sides."""
    lows, highs = [max(point.low, floor) for point in points], [point.high for point in points]
    if kl:
        axes.set_yscale("log")
        axes.set_ylim(min(lows) / 1.8, max(highs) * 2.2)
    else:
        room = 0.12 * max(max(highs) - min(lows), 1.0)
        axes.set_ylim(max(min(lows) - room, -1), min(max(highs) + room, 101))
    left, right = min(point.x for point in points), max(point.x for point in points)
    room = max(right - left, right * 0.1)
    axes.set_xlim(left - 0.08 * room, right + 0.14 * room)


def _ticks(axes: Axes, log: bool) -> None:
    if not log:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        return
    axes.yaxis.set_major_locator(LogLocator(base=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 1)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def front(points: Sequence[Point], *, lower: bool) -> list[Point]:
    """Points that no other beats or equals in size and is better in y, by size; of equal points the first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y if lower else -point.y)):
        if not best or (point.y < best[-1].y if lower else point.y > best[-1].y):
            best.append(point)
    return best


def _place(axes: Axes, canvas: FigureCanvasAgg, points: Sequence[Point], floor: float, best: set[str]) -> None:
    """Draw all points, side by side where they are equally large, and name them."""
    boxes: list[Box] = []
    centres: dict[str, tuple[float, float]] = {}
    for point, shift in zip(points, _side_by_side(points, axes), strict=True):
        low = max(point.low, floor)
        pixel = axes.transData.transform((point.x, point.y))
        x = axes.transData.inverted().transform((pixel[0] + shift, pixel[1]))[0]
        _mark(axes, x, point, low)
        centre = axes.transData.transform((x, point.y))
        bar = [axes.transData.transform((x, end))[1] for end in (low, point.high)]
        boxes += [
            Box(centre[0] - 4.5, centre[1] - 4.5, centre[0] + 4.5, centre[1] + 4.5),
            Box(centre[0] - 1.5, bar[0], centre[0] + 1.5, bar[1]),
        ]
        centres[point.slug] = float(centre[0]), float(centre[1])
    named = [point for point in points if not point.small or point.slug in best]
    _labels(axes, canvas, named, [centres[point.slug] for point in named], boxes)


def _mark(axes: Axes, x: float, point: Point, low: float) -> None:
    width = 0.8 if point.small else 1.6
    axes.plot([x, x], [low, point.high], color=point.colour, linewidth=width, solid_capstyle="round")
    axes.plot(
        x,
        point.y,
        marker=point.marker,
        color=point.colour,
        markerfacecolor=point.colour if point.filled else PAPER,
        markersize=4.5 if point.small else 7,
        markeredgewidth=width,
        linestyle="none",
    )


def _side_by_side(points: Sequence[Point], axes: Axes) -> list[float]:
    """Shift in points for each point, so that intervals of equally large arms do not cover each other."""
    at = [float(axes.transData.transform((point.x, point.y))[0]) for point in points]
    shifts = [0.0] * len(points)
    todo = sorted(range(len(points)), key=lambda index: (at[index], points[index].y))
    while todo:
        near = [index for index in todo if at[index] - at[todo[0]] < SIDE_BY_SIDE_PT]
        for place, index in enumerate(near):
            shifts[index] = at[todo[0]] - at[index] + (place - (len(near) - 1) / 2) * SIDE_BY_SIDE_PT
        todo = [index for index in todo if index not in near]
    return shifts


def _labels(
    axes: Axes,
    canvas: FigureCanvasAgg,
    points: Sequence[Point],
    centres: Sequence[tuple[float, float]],
    taken: list[Box],
) -> None:
    """Write every slug where it covers least; a label that had to move away gets a line to its point."""
    frame = axes.get_window_extent()
    inside = Box(frame.x0, frame.y0, frame.x1, frame.y1)
    for point, (x, y) in sorted(zip(points, centres, strict=True), key=lambda pair: -pair[1][1]):
        text = axes.annotate(
            point.slug, (x, y), xycoords="figure points", annotation_clip=False, color=INK, va="center", ha="left"
        )
        extent = text.get_window_extent(canvas.get_renderer())
        place = _best_place((x, y), extent.width + 2, extent.height, taken, inside)
        taken.append(place)
        text.xyann = (place.left + 1, (place.bottom + place.top) / 2)
        edge = min(max(x, place.left), place.right), min(max(y, place.bottom), place.top)
        if math.dist(edge, (x, y)) > 12:
            axes.annotate(
                "",
                edge,
                xytext=(x, y),
                xycoords="figure points",
                textcoords="figure points",
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 5, "shrinkB": 0},
                annotation_clip=False,
            )


def _best_place(point: tuple[float, float], width: float, height: float, taken: Sequence[Box], inside: Box) -> Box:
    def cost(box: Box) -> float:
        covered = sum(box.overlap(other) for other in taken)
        outside = width * height - box.overlap(inside)
        edge = min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top)
        return covered * 10 + outside * 20 + math.dist(edge, point)

    return min(_places(point, width, height), key=cost)


def _places(point: tuple[float, float], width: float, height: float) -> list[Box]:
    """Candidates right, left, above and below, near first."""
    x, y = point
    places: list[Box] = []
    for away in (8, 13, 19, 27, 37, 49):
        for up in (0, 6, -6, 12, -12, 20, -20, 30, -30, 42, -42):
            middle = y + up
            for left in (x + away, x - away - width, x - width / 2):
                if left == x - width / 2 and abs(up) < height:
                    continue
                places.append(Box(left, middle - height / 2, left + width, middle + height / 2))
    return places
