"""What the rows of the data cost in tokens and bytes, estimated from the first ones; no tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from recipes.data.files import data_files, parquet_rows, text_bytes
from recipes.data.formats import TEXT
from recipes.data.origin import Origin
from recipes.data.rows import Row
from recipes.data.turns import said_bytes
from recipes.models.headers import Headers


class RowSizes(NamedTuple):
    """What the rows of the data cost.

    Attributes:
        rows: How many there are.
        longest: Tokens of the longest.
        completion_tokens: Of an average row.
        data_bytes: Size of the file.
        tokens: Of an average row.
    """

    rows: int
    longest: int
    completion_tokens: float
    data_bytes: int
    tokens: float


def data_bytes(origin: Origin, rows: Sequence[Row]) -> int:
    """Size of a source as JSONL. Of Arrow files it is estimated by their row counts and the first rows."""
    size = 0
    for file in data_files(origin.path, config=origin.config, split=origin.split):
        count = parquet_rows(file)
        size += text_bytes(file) if count is None else round(count * _json_bytes(rows) / max(1, len(rows)))
    return size


def _json_bytes(rows: Sequence[Row]) -> int:
    lines = (json.dumps({"messages": row.messages, **row.columns}, ensure_ascii=False) for row in rows)
    return sum(len(line.encode()) + 1 for line in lines)


def row_sizes(rows: Sequence[Row], *, data_bytes: int, per_byte: float) -> RowSizes | None:
    """Estimate from the first rows of a file, scaled up to its size; None without rows.

    Args:
        rows: The first rows.
        data_bytes: Size of the whole file.
        per_byte: Tokens per byte of text, see `tokens_per_byte`.
    """
    if not rows:
        return None
    answers = [turn for row in rows for turn in row.messages if turn["role"] in ("assistant", TEXT)]
    return RowSizes(
        rows=max(len(rows), round(len(rows) * data_bytes / _json_bytes(rows))),
        longest=max(row_tokens(row, per_byte) for row in rows),
        completion_tokens=sum(per_byte * said_bytes(turn) + 2 for turn in answers) / len(rows),
        data_bytes=data_bytes,
        tokens=sum(row_tokens(row, per_byte) for row in rows) / len(rows),
    )


def tokens_per_byte(headers: Headers | None) -> float:
    """Three bytes per token with a large vocabulary, fewer with a small one; real text has fewer tokens than this."""
    if headers is None or headers.vocabulary >= 8192:
        return 1 / 3
    return 1 / 2 if headers.vocabulary >= 1024 else 1.0


def row_tokens(row: Row, per_byte: float) -> int:
    """Tokens of a row, with 16 for the template around each turn."""
    return sum(math.ceil(per_byte * said_bytes(turn)) + 16 for turn in row.messages)


def longest_answer(rows: Sequence[Row], per_byte: float) -> int:
    """Tokens of the longest last turn, with 16 for what the template puts around it; plain texts are no answers."""
    turns = [row.messages[-1] for row in rows]
    return max((math.ceil(per_byte * said_bytes(turn)) + 16 for turn in turns if turn["role"] != TEXT), default=0)
