"""Files of text, cells and Arrow: their rows, where each of them stands, and what is wrong with one."""

import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.data.files import parquet_rows, raw_rows, text_bytes
from recipes.data.texts import plain_texts
from tests.recipes.data.reading import jsonl, places, rows_of, write, wrong, zstd


def test_a_line_of_a_text_file_is_a_text(tmp_path: Path):
    text = " once\u2028upon \r\n\r\n  \n\u0085a time\nthe \u00e9nd"
    right = [" once\u2028upon ", "\u0085a time", "the énd"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = write(tmp_path / "a.txt", text.encode(encoding))
        assert rows_of(path) == [{"text": line} for line in right]
        assert places(path) == ["a.txt:1", "a.txt:4", "a.txt:5"]
    path = write(tmp_path / "a.txt", b"good\nnot \xff\nnul \0\n")
    assert wrong(path) == ["a.txt:2 is not UTF-8", "a.txt:3 holds a NUL character, which ends a text in many programs"]


def test_cells_that_hold_turns_or_tools_are_these_and_other_json_stays_text(tmp_path: Path):
    turns, tools = [{"role": "user", "content": "ü"}], [{"name": "f", "parameters": {"default": None}}]
    cells = {
        "messages": turns,
        "conversations": [{"from": "human", "value": "x"}],
        "history": [["a", "b"]],
        "tools": tools,
        "tool_calls": {"name": "f"},
        "prompt": turns,
        "chosen": turns,
    }
    texts = {
        "output": '{"a": 1}',
        "completion": '{"a": 1}',
        "rejected": "[1, 2]",
        "answer": "[]",
        "note": "{not json",
        "empty": " ",
    }
    header = ",".join([*cells, *texts, "nothing"])
    values = [json.dumps(value) for value in cells.values()] + list(texts.values()) + [""]
    line = ",".join('"' + value.replace('"', '""') + '"' for value in values)
    (row,) = rows_of(write(tmp_path / "a.csv", f"{header}\n{line}\n"))
    assert row == cells | texts
    quoted = json.dumps([{"role": "user", "content": "\ud800"}]).replace('"', '""')
    assert wrong(write(tmp_path / "a.csv", f'messages,x\n"{quoted}",y\n')) == [
        "a.csv:2 holds a `messages` that holds half of a surrogate pair, which no tokenizer reads"
    ]
    assert wrong(write(tmp_path / "a.csv", 'tools,x\n"[{",y\n'))[0].startswith(
        "a.csv:2 holds a `tools` that is not JSON"
    )


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("a.csv", 'prompt;completion\n"a;b";"c, d"\n', {"prompt": "a;b", "completion": "c, d"}),
        ("a.csv", "prompt\tcompletion\na, b\tc\n", {"prompt": "a, b", "completion": "c"}),
        ("a.tsv", "prompt\tcompletion, all\na\tb\n", {"prompt": "a", "completion, all": "b"}),
        ("a.csv", "text\nno comma; none\n", {"text": "no comma; none"}),
        ("a.csv", ",text\n0,a\n", {"": "0", "text": "a"}),
        ("a.csv", 'text,x\n"a\r\nb\u2028""c""",d\r\n', {"text": 'a\r\nb\u2028"c"', "x": "d"}),
    ],
)
def test_what_stands_between_cells(tmp_path: Path, name: str, content: str, row: dict[str, str]):
    for encoding in ("utf-8", "utf-16"):
        assert rows_of(write(tmp_path / name, content.encode(encoding))) == [row]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('a,b\n1,2\n"3,4\n5,6\n', "a.csv:3 is not CSV (unexpected end of data); what is behind it was not read"),
        ('a,b\n"1"x,2\n3,4\n', "a.csv:2 is not CSV (',' expected after '\"'); what is behind it was not read"),
        ("a,b\n1,2\n\n3\n", "a.csv:4 has 1 cells; the header has 2"),
        ("a,b\n1,\0\n", "a.csv:2 holds a NUL character, which ends a text in many programs"),
    ],
)
def test_cells_that_cannot_be_told(tmp_path: Path, content: str, says: str):
    assert wrong(write(tmp_path / "a.csv", content)) == [says]


def write_arrow(path: Path, table: pa.Table, *, file_format: bool = False) -> Path:
    make = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_table(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".arrow":
        return write_arrow(path, table)
    pq.write_table(table, path)
    return path


def test_both_kinds_of_arrow_file(tmp_path: Path):
    table = pa.Table.from_pylist([{"text": str(number)} for number in range(5)])
    for file_format in (False, True):
        path = write_arrow(tmp_path / "a.arrow", table, file_format=file_format)
        assert rows_of(path) == table.to_pylist() and places(path)[4] == "a.arrow#5" and parquet_rows(path) == 5
    assert parquet_rows(write_table(tmp_path / "a.parquet", table)) == 5
    assert parquet_rows(write(tmp_path / "b.arrow", b"none")) is None and parquet_rows(tmp_path / "c.jsonl") is None
    assert wrong(tmp_path / "b.arrow")[0].startswith("b.arrow is not arrow (")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_values_of_arrow_as_json_has_them(tmp_path: Path, name: str):
    inner = pa.struct([("a", pa.string()), ("at", pa.date32()), ("null", pa.string())])
    of_json = pa.array(['"text"'], pa.json_(pa.string()))
    columns = {
        "turns": pa.array([[{"a": "x", "at": datetime.date(2026, 1, 2)}]], pa.list_(inner)),
        "at": pa.array([datetime.datetime(2026, 1, 2, 3)], pa.timestamp("us")),
        "bytes": pa.array(["é".encode()], pa.binary()),
        "json": pa.array(['{"x": [null, "y"]}'], pa.json_(pa.string())),
        "list": pa.ListArray.from_arrays([0, 1], pa.StructArray.from_arrays([of_json], ["c"])),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "kind": pa.array(["b"]).dictionary_encode(),
        "missing": pa.array([float("nan")]),
        "nothing": pa.array([None], pa.string()),
        "score": pa.array([0.5]),
    }
    (row,) = rows_of(write_table(tmp_path / name, pa.table(columns)))
    assert row == {
        "turns": [{"a": "x", "at": "2026-01-02", "null": None}],
        "at": "2026-01-02 03:00:00",
        "bytes": "é",
        "json": {"x": [None, "y"]},
        "list": [{"c": "text"}],
        "map": {"k": 1},
        "kind": "b",
        "score": 0.5,
    }


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array(["x", "a\0b"]), "holds a NUL character, which ends a text in many programs (in `c`)"),
        (pa.array([["x"], ["\0"]]), "holds a NUL character, which ends a text in many programs (in `c`)"),
        (pa.array([b"x", b"\xff\xd8"]), "holds bytes that are no text: remove the column (in `c`)"),
        (pa.array([0.0, float("inf")]), "holds inf, which is no JSON (in `c`)"),
        (pa.array([[0.0], [float("nan")]]), "holds nan, which is no JSON (in `c`)"),
        (pa.array(["{}", '{"a": 1, "a": 2}'], pa.json_(pa.string())), "has the key 'a' twice in one object (in `c`)"),
        (pa.array([[], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), "cannot be read ("),
        (pa.array([b"x", b"\xff"]).cast(pa.string(), safe=False), "cannot be read ("),
        (pa.array([0, 2**62], pa.timestamp("us")), "cannot be read ("),
    ],
)
def test_the_row_of_an_arrow_table_that_no_json_can_hold_is_named(tmp_path: Path, column: Any, says: str):
    path = write_arrow(tmp_path / "a.arrow", pa.table({"a": ["good", "bad"], "c": column}))
    first, second = raw_rows(path)
    assert first.values is not None and first.values["a"] == "good"
    assert second.where == "a.arrow#2" and second.values is None and second.wrong.startswith(says)


# ---- general text, and how large a file is


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz"])
def test_general_text_comes_from_every_kind_of_file(tmp_path: Path, kind: str):
    rows, path = [{"text": "one,\u2028"}, {"text": "two"}], tmp_path / f"general.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        written = {
            "jsonl": jsonl(rows),
            "json": json.dumps({"rows": rows}, indent=1),
            "csv": 'text\n"one,\u2028"\n" "\ntwo\n',
            "tsv": "text\tx\none,\u2028\t1\ntwo\t2\n",
            "txt": "one,\u2028\n\ntwo",
            "jsonl.gz": jsonl([rows[0], {"text": " "}, rows[1]]),
        }[kind].encode()
        write(path, gzip.compress(written) if kind.endswith("gz") else written)
    texts = list(plain_texts(path))
    assert [text.text for text in texts] == ["one,\u2028", "two"] and texts[0].where.startswith(f"general.{kind}")


def test_general_text_that_has_none(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", jsonl([{"text": 3}, {"say": "x"}, {"text": None}]) + "{\n")
    assert [f"{text.where} {text.wrong}" for text in plain_texts(path)] == [
        "a.jsonl:1 has a int, and no text, as `text`; its columns are text",
        "a.jsonl:2 has nothing as `text`; its columns are say",
        "a.jsonl:3 has nothing as `text`; its columns are none",
        "a.jsonl:4 is not JSON (Expecting property name enclosed in double quotes: column 3)",
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_how_much_text_a_compressed_file_holds(tmp_path: Path, pack: Callable[[bytes], bytes]):
    text = "".join(f"{number**7}\n" for number in range(600_000)).encode()
    assert len(text) > 20 << 20
    assert text_bytes(write(tmp_path / "a", pack(text))) == pytest.approx(len(text), rel=0.1)
    assert text_bytes(write(tmp_path / "b", pack(text[:1000]))) == 1000
