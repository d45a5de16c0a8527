"""A file of training rows by its number: every format, kind of file, compression and encoding, good or spoiled."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.odd import TEXTS, changed, nested, odd
from tests.fuzz.recipes import QUICKSTART

ROWS = 300  # enough for dev, test and 40 rows of calibration
LEGAL_SHARE = 0.35
ENDINGS = (".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow", "")
PACKED = ("", "", "", "", ".gz", ".xz", ".bz2", ".zst")
RECIPE = (
    "name: fuzz\nmodel: {{base: base}}\ndata: {{path: {path}, dev: 0.15, test: 0.15{more}}}\n"
    "calibrate: {{rows: 40, allow_unusual_size: a test, seq_len: 256}}\nquantize: {{schemes: [rtn-w4-g128]}}\n"
)
MORE = ("", "", "", ", domain: family", ", group: group", ", keep: {family: [join, group]}", ", format: messages")


def place(folder: Path) -> None:
    """The base."""
    (folder / "base").symlink_to(QUICKSTART / "base")


def name(number: int) -> str:
    """The name of a case's file; what is in it may be of another kind."""
    draw = Random(f"name {number}")
    return "rows" + draw.choice(ENDINGS) + draw.choice(PACKED)


def recipe(number: int) -> str:
    """The recipe that reads it."""
    more = Random(f"recipe of rows {number}").choice(MORE)
    return RECIPE.format(path=name(number), more=more)


def rows(number: int) -> bytes:
    """The file."""
    draw = Random(f"rows {number}")
    table = [make(*pair) for make in [draw.choice(FORMATS)] for pair in pairs()]
    legal = draw.random() < LEGAL_SHARE
    if not legal and draw.random() < 0.7:
        for _ in range(draw.choice((1, 1, 3, 40))):
            at = draw.randrange(len(table))
            table[at] = changed(table[at], draw) if draw.random() < 0.7 else odd(draw)
    parts = name(number).split(".")
    kind = parts[1] if len(parts) > 1 else "jsonl"
    raw = _written(table, kind, draw)
    if not legal and draw.random() < 0.4:
        raw = draw.choice(SPOILS)(raw, draw)
    return PACKERS.get(parts[-1], lambda raw: raw)(raw)


@cache
def pairs() -> tuple[tuple[str, str, dict[str, Any]], ...]:
    """Question, answer and other columns of the quickstart's rows."""
    with (QUICKSTART / "data" / "sql.jsonl").open(encoding="utf-8") as file:
        read = [json.loads(line) for _, line in zip(range(ROWS * 3), file, strict=False)][::3]
    return tuple(
        (row["messages"][0]["content"], row["messages"][1]["content"], {"family": row["family"], "group": row["group"]})
        for row in read
    )


# ---- formats: one function each, from question, answer and other columns

PROPERTIES = {"a": {"type": "integer", "enum": [1, None], "anyOf": [{"type": "null"}]}}
PARAMETERS = {"type": "object", "properties": PROPERTIES}
TOOL = {"type": "function", "function": {"name": "run", "parameters": PARAMETERS}}
CALL = {"type": "function", "id": "1", "function": {"name": "run", "arguments": {"a": None}}}

Row = dict[str, Any]
FORMATS: tuple[Callable[[str, str, Row], Row], ...] = (
    lambda q, a, more: more | {"messages": [_turn("user", q), _turn("assistant", a)]},
    lambda q, a, more: more | {"messages": [_turn("system", "Be short."), _turn("user", q), _turn("assistant", a)]},
    lambda q, a, more: more | {"messages": [_turn("user", [{"type": "text", "text": q}]), _turn("assistant", a)]},
    lambda q, a, more: (
        more
        | {
            "tools": [TOOL],
            "messages": [
                _turn("user", q),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                _turn("tool", "1"),
                {"role": "assistant", "content": a, "reasoning_content": "so", "weight": 1},
            ],
        }
    ),
    lambda q, a, more: (
        more
        | {
            "tools": json.dumps([TOOL["function"]]),
            "conversations": [
                {"from": "human", "value": q},
                {"from": "function_call", "value": json.dumps({"name": "run", "arguments": {"a": 1}})},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": a},
            ],
        }
    ),
    lambda q, a, more: more | {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    lambda q, a, more: more | {"prompt": q, "completion": a},
    lambda q, a, more: more | {"prompt": [_turn("user", q)], "completion": [_turn("assistant", a)], "system": "s"},
    lambda q, a, more: more | {"instruction": q, "input": "", "output": a, "history": [["hello", "good day"]]},
    lambda q, a, more: more | {"instruction": q, "input": "here", "output": a, "system": "Be short."},
    lambda q, a, more: more | {"text": f"{q}\n{a}"},
    lambda q, a, more: more | {"prompt": q, "chosen": a, "rejected": "no"},
    lambda q, a, more: more | {"question": q, "answer": a},
)


def _turn(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


# ---- kinds of file


def _written(table: list[Any], kind: str, draw: Random) -> bytes:
    match kind:
        case "json":
            tree = draw.choice((table, table, {"version": 1, "data": table}, {"a": table, "b": table}))
            return json.dumps(tree, indent=draw.choice((None, 1)), ensure_ascii=draw.random() < 0.7).encode(
                "utf-8", "surrogatepass"
            )
        case "csv" | "tsv":
            return _cells(table, "," if kind == "csv" else "\t", draw)
        case "txt":
            return "".join(str(row) + "\n" for row in table).encode("utf-8", "surrogatepass")
        case "parquet" | "arrow" if (made := _arrow(table, kind)) is not None:
            return made
        case _:
            return b"".join(_line(row, draw) for row in table)


def _line(row: Any, draw: Random) -> bytes:
    text = json.dumps(row, ensure_ascii=draw.random() < 0.8, default=str)
    return text.encode("utf-8", "surrogatepass") + draw.choice((b"\n",) * 60 + (b"\r\n", b"\n\n", b" \n"))


def _cells(table: list[Any], delimiter: str, draw: Random) -> bytes:
    rows = [row if isinstance(row, dict) else {"text": row} for row in table]
    out = io.StringIO(newline="")
    names = [str(name) for name in rows[0]] or ["text"]
    writer = csv.writer(
        out, delimiter=delimiter, quoting=draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), escapechar="\\"
    )
    writer.writerow(names)
    for row in rows:
        writer.writerow(
            json.dumps(value) if isinstance(value, list | dict) else str(value) for value in (row.get(n) for n in names)
        )
    return out.getvalue().encode(draw.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig")), "surrogatepass")


def _arrow(table: list[Any], kind: str) -> bytes | None:
    """None where Arrow cannot hold these rows."""
    try:
        made = pa.Table.from_pylist([row for row in table if isinstance(row, dict)])
        out = io.BytesIO()
        if kind == "parquet":
            pq.write_table(made, out)
        else:
            with pa.ipc.new_stream(out, made.schema) as writer:
                writer.write_table(made)
        return out.getvalue()
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError, RecursionError):
        return None


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lambda raw: lzma.compress(raw, preset=0),
    "bz2": bz2.compress,
    "zst": lambda raw: pa.compress(raw, codec="zstd", asbytes=True),
}


def _at(raw: bytes, draw: Random, put: bytes) -> bytes:
    at = draw.randrange(len(raw) + 1)
    return raw[:at] + put + raw[at:]


SPOILS: tuple[Callable[[bytes, Random], bytes], ...] = (
    lambda raw, draw: raw[: draw.randrange(len(raw) + 1)],
    lambda raw, draw: b"",
    lambda raw, draw: raw.decode("utf-8", "replace").encode("utf-16"),
    lambda raw, draw: raw.decode("utf-8", "replace").encode("utf-32"),
    lambda raw, draw: b"\xef\xbb\xbf" + raw,
    lambda raw, draw: _at(raw, draw, "Öfen".encode("latin-1")),
    lambda raw, draw: raw[: len(raw) // 2] + raw[len(raw) // 2 :].decode("utf-8", "replace").encode("utf-16"),
    lambda raw, draw: _at(raw, draw, b"\0"),
    lambda raw, draw: _at(raw, draw, b"\\ud800"),
    lambda raw, draw: _at(raw, draw, b"\xed\xa0\x80"),
    lambda raw, draw: _at(raw, draw, draw.choice(TEXTS).encode("utf-8", "surrogatepass")),
    lambda raw, draw: _at(raw, draw, b"[" * draw.choice((100, 100_000))),
    lambda raw, draw: _at(raw, draw, b'{"a":' * draw.choice((100, 100_000))),
    lambda raw, draw: _at(raw, draw, b"\n" + json.dumps({"text": nested(300, mapping=True)}).encode() + b"\n"),
    lambda raw, draw: _at(raw, draw, b'\n{"text": "a", "n": ' + b"9" * 5000 + b"}\n"),
    lambda raw, draw: _at(raw, draw, b'\n{"text": "a", "n": NaN, "m": 1e999, "k": -Infinity}\n'),
    lambda raw, draw: _at(raw, draw, b'\n{"text": "a", "text": "b"}\n'),
    lambda raw, draw: _at(raw, draw, b'\n{"text": "' + b"x" * 2_000_000 + b'"}\n'),
    lambda raw, draw: raw.replace(b"\n", b"\r"),
    lambda raw, draw: raw.replace(b"\n", b""),
    lambda raw, draw: raw.replace(b'"', b"'", draw.choice((1, 3, 10**6))),
    lambda raw, draw: gzip.compress(raw)[: draw.randrange(10, 2000)],
    lambda raw, draw: gzip.compress(gzip.compress(raw)),
    lambda raw, draw: b"\x28\xb5\x2f\xfd" + draw.randbytes(100),
    lambda raw, draw: b"\xfd7zXZ\x00" + draw.randbytes(100),
    lambda raw, draw: b"PAR1" + draw.randbytes(100) + b"PAR1",
    lambda raw, draw: gzip.compress(b"\n" * 200_000_000, 1) if draw.random() < 0.1 else gzip.compress(b" " * 3_000_000),
    lambda raw, draw: gzip.compress(b"[" * 40_000_000, 1) if draw.random() < 0.2 else gzip.compress(b"[" * 3_000_000),
    lambda raw, draw: draw.randbytes(3000),
    lambda raw, draw: raw + b"".join(b'{"k%d": 1}\n' % n for n in range(20_000)),
)
