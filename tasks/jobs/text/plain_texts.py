"""Texts that stand alone, a row each: general text, of which every token counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recipes.data.files import FolderChoice
from recipes.data.texts import plain_texts, text_name
from tasks.runtime.process.errors import StageError


def read_texts(path: Path, *, what: str) -> Iterator[tuple[str, str]]:
    """Name and text of every row with a column `text`, in a file of any kind; the name is a hash of the text.

    Raises:
        StageError: A row has no text; `what` names the file's purpose.
    """
    try:
        for where, text, wrong in plain_texts(path):
            if text is None:
                raise StageError.of(
                    what=f"malformed row in {what}",
                    where=where,
                    why=f"it {wrong}",
                    next=f'correct or remove it in {path}; rows are {{"text": "..."}}',
                )
            yield text_name(text), text
    except FolderChoice as choice:
        raise StageError(choice.problem(str(path), written="nowhere")) from None
