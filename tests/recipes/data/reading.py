"""Files of rows for tests, and what is read from them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from recipes.data.files import raw_rows


def rows_of(path: Path) -> list[dict[str, Any] | None]:
    return [row.values for row in raw_rows(path)]


def places(path: Path) -> list[str]:
    return [row.where for row in raw_rows(path)]


def wrong(path: Path) -> list[str]:
    return [f"{row.where} {row.wrong}" for row in raw_rows(path) if row.values is None]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list[Any], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def zstd(data: bytes) -> bytes:
    written = pa.BufferOutputStream()
    with pa.CompressedOutputStream(written, "zstd") as stream:
        stream.write(data)
    return written.getvalue().to_pybytes()
