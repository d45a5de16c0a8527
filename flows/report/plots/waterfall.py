"""Where the loss goes: one bar per step from the trained model to what is shipped, and the base's NF4 apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.report.plots.style import BAD, GOOD, INK, MUTED, PAPER, STYLE, WIDTH_IN, as_svg, plain_axes
from flows.results.metrics import decimals

ROW_IN, AROUND_IN = 0.27, 0.85  # height of a bar's row; of axis and margins
COLOUR = {"worse": BAD, "better": GOOD}  # of what is shown; anything else is drawn hollow


class FloatingBar(NamedTuple):
    """One step, in nats per token above the model as it was trained.

    Attributes:
        low: Lower end of the step's interval, put at its start.
        high: Upper end.
    """

    name: str
    step: str
    before: str
    start: float
    end: float
    low: float
    high: float
    verdict: str
    text: str


def bars(waterfall: Mapping[str, Any]) -> list[FloatingBar]:
    """Every step once, in the order of the paths: what paths share is drawn once."""
    bars: dict[tuple[str, str], FloatingBar] = {}
    for path in waterfall["paths"]:
        losses: Mapping[str, float] = path["losses"]
        for step in path["steps"]:
            if (step["from"], step["to"]) not in bars and step["from"] in losses:
                trained = losses[path["steps"][0]["from"]]
                bars[step["from"], step["to"]] = _bar(step, losses[step["from"]] - trained)
    return list(bars.values())


def _bar(step: Mapping[str, Any], start: float) -> FloatingBar:
    low, high = step["ci95_adjusted"] or (step["difference"], step["difference"])
    return FloatingBar(
        name=step["to"],
        step=step["step"],
        before=step["from"],
        start=start,
        end=start + step["difference"],
        low=start + low,
        high=start + high,
        verdict=step["verdict"],
        text=signed(step["difference"], step["ci95_adjusted"]),
    )


def signed(value: float, ci95: Sequence[float] | None) -> str:
    """`+0.0021`, with the digits that its interval supports."""
    places = decimals((ci95[1] - ci95[0]) / 2) if ci95 else 4
    text = f"{value:+.{places}f}".replace("-", "−")
    return text if float(f"{value:.{places}f}") else "0"


def waterfall_plot(waterfall: Mapping[str, Any] | None) -> str:
    """SVG: one floating bar per step, with the interval of its end; nothing where there is no path."""
    rows = bars(waterfall) if waterfall else []
    if not waterfall or not rows:
        return ""
    base = [_bar(waterfall["base"], 0.0)] if waterfall.get("base") else []
    with mpl.rc_context(STYLE):
        height = ROW_IN * (len(rows) + 1.5 * len(base)) + AROUND_IN * (1 + 0.7 * len(base))
        figure = Figure(figsize=(WIDTH_IN, height), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        shares = [len(rows) + 0.4, *(1.0 for _ in base)]
        axes = figure.subplots(len(shares), 1, squeeze=False, gridspec_kw={"height_ratios": shares})[:, 0]
        unit = "nats a token"
        _draw(axes[0], rows, f"loss above the model as trained, {unit}")
        for bar in base:
            _draw(axes[1], [bar], f"loss above the base in bf16, {unit}")
        return as_svg(figure, "Loss waterfall: what each step from training to serving adds to the mean loss a token")


def _draw(axes: Axes, rows: Sequence[FloatingBar], label: str) -> None:
    children: dict[str, list[int]] = {}
    for row, bar in enumerate(rows):
        shown = COLOUR.get(bar.verdict)
        axes.barh(
            row,
            bar.end - bar.start,
            left=bar.start,
            height=0.52,
            color=shown or PAPER,
            edgecolor=shown or MUTED,
            linewidth=1.2,
        )
        axes.plot([bar.low, bar.high], [row, row], color=INK, linewidth=1.1, solid_capstyle="butt")
        axes.plot(bar.end, row, marker="|", color=INK, markersize=9, markeredgewidth=1.6)
        axes.annotate(
            bar.text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, annotation_clip=False
        )
        children.setdefault(bar.before, []).append(row)
    for row, bar in enumerate(rows):
        if last := max(children.get(bar.name, []), default=None):
            axes.plot([bar.end, bar.end], [row, last], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(rows)), [bar.name for bar in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    plain_axes(axes, x=label, y="")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", colors=INK)
