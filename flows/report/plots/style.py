"""Colours, fonts and SVG: what all plots of the page share."""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
GOOD, BAD = "#0a0a0a", "#0b0b0b"
FAMILY_COLOUR = {"merged": "#050505", "gptq": "#060606", "awq": "#070707", "rtn": "#080808", "other": "#090909"}
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    GOOD: "--good",
    BAD: "--bad",
    **{colour: f"--{name}" for name, colour in FAMILY_COLOUR.items()},
}
LIGHT = {  # the page's colours on white paper, and those of a picture that stands alone
    "--paper": "#ffffff",
    "--ink": "#15181d",
    "--muted": "#5b6472",
    "--grid": "#e1e5ea",
    "--good": "#00694c",
    "--bad": "#b03a00",
    "--gptq": "#0072b2",
    "--awq": "#d55e00",
    "--rtn": "#00805f",
    "--merged": "#a14a86",
    "--other": "#5b6472",
}
PICTURE_SCALE = 2.0  # pixels a point of a picture that stands alone
WIDTH_IN = 5.0  # 360 pt: text of 10 pt is 9 px high on a phone of 390 px; on a desktop two stand side by side


class Look(NamedTuple):
    """How an arm is drawn."""

    colour: str
    marker: str
    filled: bool


def family_of(slug: str) -> str:
    """Method that an arm's colour stands for: merged, gptq, awq, rtn or other; compressed-tensors as its method."""
    method = slug.removeprefix("ct-").split("-")[0]
    return method if method in FAMILY_COLOUR else "other"


def look(slug: str) -> Look:
    """Colour and shape say the method, a hollow mark is base + adapter."""
    markers = {"gptq": "o", "awq": "D", "rtn": "^", "merged": "s", "other": "s"}
    method = family_of(slug)
    hollow = slug.endswith(".on-base") or slug == "nf4-adapter"
    return Look(FAMILY_COLOUR[method], markers[method], not hollow)


def plain_axes(axes: Axes, *, x: str, y: str) -> None:
    """Labels, a quiet grid, no frame but the bottom."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


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


def as_picture(svg: str) -> str:
    """A page's figure as an SVG file of its own: light colours, a white ground, a size, a typeface."""
    for variable, colour in LIGHT.items():
        svg = svg.replace(f"var({variable})", colour)
    width, height = (float(number) for number in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    style = (
        f"<style>text{{paint-order:stroke;stroke:{LIGHT['--paper']};stroke-width:3px;stroke-linejoin:round}}</style>"
    )
    ground = style + f'<rect width="{width:g}" height="{height:g}" fill="{LIGHT["--paper"]}"/>'
    size = f'width="{width * PICTURE_SCALE:g}" height="{height * PICTURE_SCALE:g}" font-family="sans-serif"'
    return re.sub(r"(<svg)([^>]*>)", rf"\1 {size}\2{ground}", svg, count=1)


def title_of(svg: str) -> str:
    """The title that `as_svg` was given."""
    return re.findall(r'aria-label="([^"]*)"', svg)[0]


# Placeholder -> CSS variable of the page. Matplotlib wants colours; the SVG gets the variables.
STYLE: Any = {  # rcParams
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "quench",
    "text.parse_math": False,  # a name with two dollars is no formula, and need not be one
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
