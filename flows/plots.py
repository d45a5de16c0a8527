"""The report's figures, as SVG that takes its colours from the page: readable on light, dark and paper.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; shape and fill tell the same again.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flows.metrics import significant

# Placeholder -> CSS variable of the page. Matplotlib wants colours; the SVG gets the variables.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
FAMILY_COLOUR = {"merged": "#050505", "gptq": "#060606", "awq": "#070707", "rtn": "#080808", "other": "#090909"}
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    **{colour: f"--{name}" for name, colour in FAMILY_COLOUR.items()},
}
WIDTH_IN = 5.0  # 360 pt: text of 10 pt is 9 px high on a phone of 390 px; on a desktop two stand side by side
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


def look(slug: str) -> tuple[str, str, bool]:
    """Colour, marker and fill of an arm: colour and shape say the method, a hollow mark is base + adapter."""
    method = slug.split("-")[0]
    markers = {"gptq": "o", "awq": "D", "rtn": "^", "merged": "s"}
    colour = FAMILY_COLOUR.get(method, FAMILY_COLOUR["other"])
    return colour, markers.get(method, "s"), not (slug.endswith(".on-base") or slug == "nf4-adapter")


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
    )


def kl_against_size(arms: Mapping[str, Any]) -> str:
    """SVG: kl_mean (log axis) against size_bytes. Without base (far off) and the reference (zero by definition)."""
    points = [
        _point(slug, arm, "kl_mean")
        for slug, arm in arms.items()
        if arm["ranked"] and slug != "base" and arm["metrics"]["kl_mean"]["value"]
    ]
    if not points:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.2), dpi=72, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_yscale("log")
        floor = min(point.y for point in points) / 10
        axes.set_ylim(min(max(point.low, floor) for point in points) / 1.8, max(point.high for point in points) * 2.2)
        left, right = min(point.x for point in points), max(point.x for point in points)
        room = max(right - left, right * 0.1)
        axes.set_xlim(left - 0.08 * room, right + 0.14 * room)
        plain_axes(axes, x="size, MB (what a server fetches)", y="KL to the reference, nats a token")
        axes.yaxis.set_major_locator(LogLocator(base=10))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 1)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        canvas.draw()
        figure.set_layout_engine("none")  # labels are placed in the frame as it stands now
        boxes: list[Box] = []
        centres: list[tuple[float, float]] = []
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
            centres.append((float(centre[0]), float(centre[1])))
        _labels(axes, canvas, points, centres, boxes)
        return as_svg(figure, "KL to the reference against size, one point an arm, with 95 % intervals")


def task_by_arm(arms: Mapping[str, Any]) -> str:
    """SVG: the task score of every ranked arm with its interval, the trained model's as a line."""
    scored = {slug: arm for slug, arm in arms.items() if arm["metrics"]["task"]["value"] is not None}
    points = [_point(slug, arm, "task", 100) for slug, arm in scored.items() if arm["ranked"] and slug != "base"]
    if not points:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.2), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for row, point in enumerate(reversed(points)):
            axes.plot([point.low, point.high], [row, row], color=point.colour, linewidth=1.6, solid_capstyle="round")
            axes.plot(
                point.y,
                row,
                marker=point.marker,
                color=point.colour,
                markerfacecolor=point.colour if point.filled else PAPER,
                markersize=7,
                markeredgewidth=1.6,
            )
        for point in points:
            if point.slug == "nf4-adapter":
                axes.axvline(point.y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(points)), [point.slug for point in reversed(points)])
        axes.set_ylim(-0.7, len(points) - 0.3)
        axes.margins(x=0.04)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        plain_axes(axes, x="task score, % of test answers", y="")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", colors=INK)
        return as_svg(figure, "Task score of every arm with 95 % intervals")


STYLE: Any = {  # rcParams
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "quench",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def plain_axes(axes: Axes, *, x: str, y: str) -> None:
    """Labels, a quiet grid, no frame but the bottom."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _mark(axes: Axes, x: float, point: Point, low: float) -> None:
    axes.plot([x, x], [low, point.high], color=point.colour, linewidth=1.6, solid_capstyle="round")
    axes.plot(
        x,
        point.y,
        marker=point.marker,
        color=point.colour,
        markerfacecolor=point.colour if point.filled else PAPER,
        markersize=7,
        markeredgewidth=1.6,
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
    found: list[Box] = []
    for away in (8, 13, 19, 27, 37, 49):
        for up in (0, 6, -6, 12, -12, 20, -20, 30, -30, 42, -42):
            middle = y + up
            for left in (x + away, x - away - width, x - width / 2):
                if left == x - width / 2 and abs(up) < height:
                    continue
                found.append(Box(left, middle - height / 2, left + width, middle + height / 2))
    return found


def _rounded(number: re.Match[str]) -> str:
    """Two decimals of a point are enough."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an inline SVG element, scaled by its box, coloured by CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'"[^"]*"', lambda quoted: re.sub(r"-?\d+\.\d{3,}", _rounded, quoted[0]), text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()
