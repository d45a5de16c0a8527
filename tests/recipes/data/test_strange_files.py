"""Files and folders of rows that end a reader: offsets that point outside, folders without end, devices."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from recipes.data import folders
from recipes.data.files import raw_rows
from recipes.data.rows import read_rows
from recipes.data.tools import calls_of, tools_of
from tasks.runtime.process.launch import CHECKOUT


def stream(table: pa.Table) -> bytearray:
    """An Arrow file as `save_to_disk` writes it."""
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return bytearray(out.getvalue())


def test_offsets_that_point_outside_are_refused_and_do_not_end_the_process(tmp_path: Path) -> None:
    """In a process of its own: read as they are, they end it with a segmentation fault."""
    texts = [f"text {number}" for number in range(300)]
    raw = stream(pa.table({"messages": [[{"role": "user", "content": text}] for text in texts], "text": texts}))
    ends = struct.pack("<300i", *accumulate(map(len, texts)))
    at = raw.rindex(ends) + 40
    raw[at : at + 4] = struct.pack("<i", 0x73000000)
    (tmp_path / "rows.arrow").write_bytes(raw)
    code = "import sys; from pathlib import Path; from recipes.data.files import raw_rows; "
    code += "print([row.wrong for row in raw_rows(Path(sys.argv[1]))])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows.arrow")], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "is not arrow" in done.stdout and "ffset" in done.stdout, done


def test_text_that_is_not_utf8_stays_a_matter_of_its_row(tmp_path: Path) -> None:
    raw = stream(pa.table({"text": ["good", "bad!", "fine"], "inner": [[{"a": "x"}], None, [{"a": "y"}]]}))
    raw[raw.index(b"bad!")] = 0xFF
    (tmp_path / "rows.arrow").write_bytes(raw)
    rows = list(raw_rows(tmp_path / "rows.arrow"))
    assert [row.wrong != "" for row in rows] == [False, True, False]
    assert rows[0].values == {"text": "good", "inner": [{"a": "x"}]}


def test_a_folder_with_too_much_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_ENTRIES", 5)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("x")
    (problem,) = read_rows(tmp_path).problems
    assert "more than 5 files" in problem.why and problem.next == "Name the file, or the folder, that is meant."


def test_a_device_is_no_file_of_rows() -> None:
    (problem,) = read_rows(Path("/dev/zero")).problems
    assert problem.what == "no training rows"


@pytest.mark.parametrize("head", ["a: !!int x", "configs: &a [*a]", "configs: " + "[" * 3000, "a: " + "1" * 5000])
def test_a_card_of_a_stranger_is_no_reason_to_fail(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert [row.values for row in raw_rows(tmp_path)] == [{"text": "a"}]


@pytest.mark.parametrize("properties", [{"a": {"enum": 5}}, {"a": {"anyOf": 5, "oneOf": {"b": 1}}}, {"a": 5}, [5], "a"])
def test_a_schema_of_other_types_means_no_null(properties: Any) -> None:
    tools = tools_of([{"name": "f", "parameters": {"type": "object", "properties": properties}}])
    (call,) = calls_of({"name": "f", "arguments": {"a": None}}, tools, what="turn 1")
    assert call["function"]["arguments"] == {}
