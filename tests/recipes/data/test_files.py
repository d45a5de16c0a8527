"""Files of JSON, compressed or not: their rows, where each of them stands, and what is wrong with one."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from recipes.data.files import raw_rows
from recipes.data.raw.strict import DEEPEST
from recipes.data.raw.window import Window
from recipes.data.rows import read_rows
from tests.recipes.data.reading import jsonl, places, rows_of, write, wrong, zstd

ROWS: list[dict[str, Any]] = [
    {"prompt": "Größe\u2028a\u2029b\u0085c", "completion": "x\ny"},
    {"prompt": "😀", "completion": "", "note": {"default": None}},
    {"prompt": "c", "completion": "z", "score": 0.5, "tags": ["a", None]},
]


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd, lzma.compress, bz2.compress])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_compression_and_encoding_do_not_show(tmp_path: Path, packed: Callable[[bytes], bytes], encoding: str):
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    text = (mark + "\r\n" + jsonl(ROWS, ensure_ascii=False).replace("\n", "\r\n\r\n")).encode(encoding)
    path = write(tmp_path / "rows.jsonl.packed", packed(text))
    assert rows_of(path) == ROWS
    assert places(path) == [f"rows.jsonl.packed:{line}" for line in (2, 4, 6)]


@pytest.mark.parametrize("ending", ["gz", "zst", "xz", "bz2"])
def test_the_kind_is_told_by_the_ending_before_that_of_the_compression(tmp_path: Path, ending: str):
    pack = {"gz": gzip.compress, "zst": zstd, "xz": lzma.compress, "bz2": bz2.compress}[ending]
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / f"a.csv.{ending}", pack(b"prompt,completion\nx,y\n"))
    write(folder / f"b.json.{ending}", pack(b'[{"prompt": "x"},\n {"prompt": "y"}]'))
    write(folder / f"c.TSV.{ending}", pack(b"prompt\tcompletion\nx\ty, z\n"))
    assert places(folder) == [f"a.csv.{ending}:2", f"b.json.{ending}#1", f"b.json.{ending}:2", f"c.TSV.{ending}:2"]
    assert rows_of(folder)[3] == {"prompt": "x", "completion": "y, z"}
    (text,) = rows_of(write(tmp_path / f"d.txt.{ending}", pack(b"once\n")))
    assert text == {"text": "once"}


def test_several_compressed_parts_are_one_file(tmp_path: Path):
    for pack in (gzip.compress, zstd, lzma.compress):
        assert len(rows_of(write(tmp_path / "rows", pack(b'{"a": 1}\n') + pack(b'{"a": 2}\n')))) == 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (json.dumps(ROWS, indent=2), [":2", ":6", ":13"]),
        (json.dumps(ROWS), ["#1", "#2", "#3"]),
        ("\n\n[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", [":4", ":5", ":6"]),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), [":1", ":5", ":12"]),
        ("".join(json.dumps(row, indent=1) for row in ROWS), [":1", ":4", ":10"]),
        (" ".join(map(json.dumps, ROWS)), [":1", "#2", "#3"]),
        (json.dumps({"data": ROWS}), ["#1", "#2", "#3"]),
        (json.dumps({"version": [1, {}], "rows": ROWS, "note": {"a": []}}, indent=1), [":7", ":11", ":18"]),
    ],
)
def test_json_in_any_layout_and_the_line_where_each_object_begins(
    tmp_path: Path, name: str, text: str, lines: list[str]
):
    path = write(tmp_path / name, text)
    assert rows_of(path) == ROWS
    assert places(path) == [name + line for line in lines]


def test_an_object_around_rows_is_none_where_it_is_a_row(tmp_path: Path):
    turns = [{"role": "user", "content": "x"}]
    for row in ({"messages": turns}, {"dialog": turns}, {"prompt": "a", "documents": [{"title": "b"}]}, {"tags": []}):
        assert rows_of(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]
        assert rows_of(write(tmp_path / "a.json", json.dumps(row))) == [row]
    twice = json.dumps({"data": ROWS}, indent=1) + "\n" + json.dumps({"data": ROWS}, indent=1)
    assert rows_of(write(tmp_path / "a.json", twice)) == [{"data": ROWS}, {"data": ROWS}]  # none around the other


def test_several_lists_of_rows_are_named(tmp_path: Path):
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "version": 1, "test": ROWS}))
    assert "a.json:1 is an object with several lists of rows, train, test: write the one" in wrong(path)[0]
    large = {"train": [{"text": "x" * 1000}] * 5000, "test": ROWS}
    path = write(tmp_path / "a.json", json.dumps(large))
    assert "several lists of rows, train, test" in wrong(path)[-1] and len(places(path)) == 5001


def test_a_column_without_a_value_is_none_that_the_row_has(tmp_path: Path):
    row = {"prompt": "a", "completion": None, "inner": {"default": None, "list": [None]}}
    right = {"prompt": "a", "inner": {"default": None, "list": [None]}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [right]
    assert rows_of(write(tmp_path / "a.jsonl", jsonl([row]))) == [right]
    assert rows_of(write(tmp_path / "a.json", json.dumps([row]))) == [right]


DEEP = "[" * 100_000 + "]" * 100_000
MALFORMED = [
    ('"\\ud83d"', "holds half of a surrogate pair"),
    ('{"\\udc00 key": 1}', "holds half of a surrogate pair"),
    ('[{"a": ["x\\uD800y"]}]', "holds half of a surrogate pair"),
    ('"\\u0000"', "holds a NUL character"),
    ('{"a\\u0000": 1}', "holds a NUL character"),
    ('"a\0b"', "is not JSON (Invalid control character"),
    ("9" * 5000, "holds an integer with thousands of digits"),
    ("-1e999", "holds a number that is too large: -1e999"),
    ("1" * 400 + ".5", "holds a number that is too large: 1111"),
    ("NaN", "holds NaN, which is no JSON"),
    ("-Infinity", "holds -Infinity, which is no JSON"),
    ('{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice in one object"),
    (DEEP, f"is nested deeper than {DEEPEST} levels"),
    ("[" * DEEPEST + "]" * DEEPEST, f"is nested deeper than {DEEPEST} levels"),
    ('{"a": 1', "is not JSON (Expecting"),
    ("tru", "is not JSON (Expecting value"),
    ('"\\q"', "is not JSON (Invalid \\escape"),
]


@pytest.mark.parametrize(("value", "says"), MALFORMED)
@pytest.mark.parametrize("layout", ["lines", "list", "printed"])
def test_the_malformed_row_is_named_and_the_others_are_read(tmp_path: Path, layout: str, value: str, says: str):
    rows = ['{"x": 1}', f'{{"x": {value}}}', '{"x": 3}', '{"x": 4}']
    if layout == "list":
        text, line = "[" + ",\n".join(rows) + "]", 2
    elif layout == "lines":
        text, line = "\n".join(rows), 2
    else:
        text, line = "\n".join(row.replace("{", "{\n ", 1) for row in rows), 3
    path = write(tmp_path / "a.json", text)
    first, *more = wrong(path)
    assert first.startswith(f"a.json:{line} {says}") and len(first) < 150 and "\n" not in first
    good = [row["x"] for row in rows_of(path) if row]
    if value != '{"a": 1' or layout != "list":  # without its end, what follows in a list cannot be told
        assert good == [1, 3, 4] and not more
    else:
        assert good == [1]


@pytest.mark.parametrize(("value", "says"), MALFORMED)
def test_json_text_within_a_row_is_as_strict(tmp_path: Path, value: str, says: str):
    asked, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": f'{{"x": {value}}}'}}]}
    rows = [
        {"messages": [asked, call]},
        {"messages": json.dumps([asked, answer])[:-1] + f', {{"x": {value}}}]'},
        {"instruction": "x", "output": "y", "history": f"[{value}]"},
        {"messages": [asked, answer], "tools": f'[{{"name": "f", "parameters": {value}}}]'},
    ]
    for row in rows:
        (line,) = read_rows(write(tmp_path / "a.jsonl", jsonl([row]))).wrong
        assert line.startswith("a.jsonl:1 ") and len(line) < 250
        reason = "holds a NUL" if "\0" in value else says.removeprefix("is not JSON (")
        assert reason[:20] in line


def test_what_is_right_beside_it(tmp_path: Path):
    most = json.loads("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    row = {"a": "\\ud800 \\u0000 NaN 1e999", "😀": "😀", "n": 10**300, "f": 1e308, "b": "{" * 500, "d": most}
    for ascii_only in (True, False):
        assert rows_of(write(tmp_path / "a.jsonl", jsonl([row, row], ensure_ascii=ascii_only))) == [row, row]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": "\xff"}\n{"a": 1}\n', ["a.json:1 is not UTF-8"]),
        (b'{"a": "\xed\xa0\x80"}\n{"a": 1}\n', ["a.json:1 is not UTF-8"]),
        (b'[{"a": "\xff"}, {"a": 1}]', ["a.json#1 is not UTF-8"]),
        (b'\xff\xfe{\x00"', ["a.json cannot be read to its end"]),
        (b'{"a": 1}\n3\nnull\n', ["a.json:2 is a JSON int, not", "a.json:3 is a JSON NoneType, not"]),
        (b'[{"a": 1}, [2]]', ["a.json#2 is a JSON list in a list of rows, not an object"]),
        (b'[{"a": 1}, {"a": 2}', ["a.json:1 is not JSON (its list of rows has no end)"]),
        (b'[{"a": 1} {"a": 2}]', ["a.json:1 is not JSON (its list of rows goes on with '{')"]),
        (b'[{"a": 1},\n]', ["a.json:2 is not JSON (Expecting value: line 2, near ']')"]),
        (b'[\n{"a": 1}]\n\n{"a": 2}', ["a.json:4 goes on behind the end of its list of rows"]),
        (b'{"data": [{"a": 1}]}\n', []),
        (b"PK\x03\x04\x00\xff\x00\n\x00\x01", ["a.json:1 is not JSON (Expecting value: column 1)"]),
    ],
)
def test_files_of_json_that_are_not_whole(tmp_path: Path, content: bytes, says: list[str]):
    found = wrong(write(tmp_path / "a.json", content))
    assert [line[: len(start)] for line, start in zip(found, says, strict=False)] == says
    assert bool(found) == bool(says)


@pytest.mark.parametrize("pack", [gzip.compress, zstd, lzma.compress, bz2.compress])
def test_a_compressed_file_that_breaks_off(tmp_path: Path, pack: Callable[[bytes], bytes]):
    packed = pack(jsonl([{"x": str(number**9)} for number in range(20_000)]).encode())
    path = write(tmp_path / "a.jsonl", packed[: len(packed) // 2])
    *good, last = raw_rows(path)
    assert last.values is None and f"{last.where} {last.wrong}".startswith("a.jsonl cannot be read to its end (")
    assert all(row.values for row in good[:-1])


def test_a_file_that_may_not_be_read_is_said(tmp_path: Path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")  # it leads to itself
    (row,) = raw_rows(write(tmp_path / "b.parquet", b""))
    assert row.wrong.startswith("is not parquet (")
    assert rows_of(tmp_path / "a.jsonl") == []


UNICODE = some.characters(exclude_categories=["Cs"], exclude_characters="\0")  # no halves of surrogate pairs
VALUES = some.recursive(
    some.none() | some.booleans() | some.integers(-(10**20), 10**20) | some.text(UNICODE),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text('ab{["\\\\,:]}\n', max_size=3), inner),
    max_leaves=8,
)
OBJECTS = some.lists(some.dictionaries(some.text('abc{"', min_size=1), VALUES), max_size=4)


@settings(max_examples=150, deadline=None)
@given(OBJECTS, some.sampled_from([None, 0, 2]), some.integers(1, 60))
def test_a_window_of_any_size_gives_what_is_in_the_text(rows: list[dict[str, Any]], indent: int | None, chunk: int):
    text = json.dumps(rows, indent=indent)
    window, read = Window(io.StringIO(text, newline=""), chunk=chunk), list[Any]()
    assert window.take("[")
    while window.peek() not in ("]", ""):
        before = window.line
        assert window.ahead() == rows[len(read)] and window.line == before
        read.append(window.value())
        window.take(",")
    assert read == rows and window.take("]") and window.peek() == ""
    assert window.line == text.count("\n") + 1


@settings(max_examples=300, deadline=None)
@given(some.text('{}[]"\\,:1etruNa\n\0 \ufeff\ud800', max_size=40))
def test_no_text_ends_in_a_traceback(text: str):
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "any.json", text.encode("utf-8", errors="surrogatepass"))
        read = list(raw_rows(path))
    assert all(row.values is not None or row.wrong for row in read)
    assert read or "".join(text.split()).removeprefix("\ufeff") in ("", "[]")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("around", [False, True])
def test_rows_of_a_large_list_are_never_held_together(tmp_path: Path, around: bool, indent: int | None):
    row = {"prompt": "x" * 100, "completion": "y" * 9900}
    rows = [row] * 5000
    path = write(tmp_path / "a.json", json.dumps({"data": rows} if around else rows, indent=indent))
    size = path.stat().st_size
    assert size > 50_000_000
    tracemalloc.start()
    assert sum(row.values is not None for row in raw_rows(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2.5  # measured: 1 MB; 17 MB of an object around them, whose first 4 MiB could be a row
