"""General text: rows with a column `text`, in a file of any kind. The recipe's check and the jobs read it alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipes.data.files import raw_rows
from recipes.data.rows import normalised

COLUMN = "text"


class PlainText(NamedTuple):
    """A general text.

    Attributes:
        where: `file:LINE`, or `file#ROW`.
        text: None where the row has none.
        wrong: Why.
    """

    where: str
    text: str | None
    wrong: str = ""


def plain_texts(path: Path) -> Iterator[PlainText]:
    """The texts of a file or folder, in its order. A blank one is left out, as a blank line is.

    Raises:
        FolderChoice: The folder has several sets of rows.
    """
    for where, values, wrong in raw_rows(path):
        if values is None:
            yield PlainText(where, None, wrong)
            continue
        text = values.get(COLUMN)
        if not isinstance(text, str):
            kind = f"a {type(text).__name__}, and no text," if COLUMN in values else "nothing"
            yield PlainText(where, None, f"has {kind} as `{COLUMN}`; its columns are {', '.join(values) or 'none'}")
        elif text.strip():
            yield PlainText(where, text)


def text_name(text: str) -> str:
    """16 hex digits of a general text. White space and Unicode forms do not count: a copy is found all the same."""
    return hashlib.sha256(normalised([{"content": text}]).encode()).hexdigest()[:16]
