"""What data, models, other people's files and exceptions say, where Markdown, a page or a terminal would obey it.

Pages escape by themselves (Jinja's autoescape). Here is what that leaves: control characters, which a terminal obeys
and nobody sees; marks of writing direction, which make a name look like another one; Markdown.
"""

from __future__ import annotations

import re
from typing import Any

# Controls but tab and line feed, marks of direction, halves of a character (no file can be written with one). Not the
# joiners U+200C and U+200D, which Persian and families of emoji are written with.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TAG = re.compile(r"<(?=[A-Za-z/!?])")
LINK = re.compile(r"\](?=[(:])|!(?=\[)")  # [text](place), [name]: place, ![picture]


def visible(text: str) -> str:
    """The text with the escape of each character that a terminal would obey; tabs and line feeds stay."""
    return OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same without line ends: a line that data begins could be a heading, a table, a link's address."""
    return " ".join(map(visible, text.splitlines()))


def inert(markdown: str) -> str:
    """Markdown of ours, in which nothing of what others say is taken for HTML, a link or a picture."""
    return visible(LINK.sub(lambda mark: f"\\{mark[0]}", TAG.sub("&lt;", markdown)))


def on_pages(value: Any) -> Any:
    """report.json with every text `visible`, names of fields too."""
    return _each(value, visible)


def in_lines(value: Any) -> Any:
    """report.json with every text on `one_line`, names of fields too."""
    return _each(value, one_line)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_each(name, change): _each(part, change) for name, part in value.items()}
    return [_each(part, change) for part in value] if isinstance(value, list) else value
