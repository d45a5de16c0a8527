"""Texts that stand alone, one a line: general text, of which every token counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from recipes.data.formats import TEXT
from recipes.data.rows import content_hash
from tasks.runtime.process.errors import StageError


def read_texts(path: Path, *, what: str) -> Iterator[tuple[str, str]]:
    """Name and text of every line `{"text": ...}`; the name is a hash of the text.

    Raises:
        StageError: A line is something else; `what` names the file's purpose.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            text: str = json.loads(line)["text"]
            text.encode()  # fails for a number, and for half of a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StageError.of(
                what=f"malformed row in {what}",
                where=f"{path.name}:{number}",
                why=f'rows are {{"text": ...}} ({error!r})',
                next=f"correct line {number} of {path}",
            ) from None
        yield content_hash([{"role": TEXT, "content": text}])[:16], text
