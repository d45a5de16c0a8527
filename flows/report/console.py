"""A terminal for rich's tables and styles, to which everything that is printed is text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from flows.report.inert import visible


class TextConsole(Console):
    """Data may say [red], [/INST] (at which rich raises) or :name:, and hold sequences that a terminal obeys."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every part of a line, styles as rich has them, texts visible."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)
