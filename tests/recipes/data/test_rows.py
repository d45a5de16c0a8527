"""Rows: formats, content hash, split."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.data.origin import Origin
from recipes.data.rows import content_hash, drawn, normalised, read_origin, read_rows, side
from tests.recipes.folders import chat, write_rows


def test_both_formats_are_one_row(tmp_path: Path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first = read_rows(write_rows(tmp_path / "a.jsonl", [{"messages": turns, "kind": "x"}]))
    second = read_rows(write_rows(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b", "kind": "x"}]))
    assert (first.format, second.format) == ("messages", "prompt-completion")
    assert first.rows[0].messages == second.rows[0].messages == turns
    assert first.rows[0].columns == second.rows[0].columns == {"kind": "x"}


def test_lines_are_counted_as_an_editor_does(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(chat(1)).encode() + b"\r\n\r\n" + json.dumps(chat(2)).encode())
    read = read_rows(path)
    assert [row.where for row in read.rows] == ["rows.jsonl:1", "rows.jsonl:3"] and not read.problems


def test_max_rows_reads_no_further(tmp_path: Path):
    read = read_rows(write_rows(tmp_path / "rows.jsonl", ["", chat(1), "broken"]), max_rows=1)
    assert len(read.rows) == 1 and not read.problems


def test_text_that_no_tokenizer_reads(tmp_path: Path):
    row = '{"prompt": "a", "completion": "\\ud800"}'
    assert "surrogate" in read_rows(write_rows(tmp_path / "rows.jsonl", [row])).wrong[0]
    assert "JSON" in read_rows(write_rows(tmp_path / "rows.jsonl", ["\\xff"])).wrong[0]


def test_a_name_tells_rows_apart_to_the_last_space_and_a_question_does_not():
    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    for one, other in ((" a\n b\t", "a b"), ("e\u0301", "\u00e9"), ("A", "a")):
        assert content_hash(turn(one)) != content_hash(turn(other))
        assert (normalised(turn(one)) == normalised(turn(other))) == (one != "A")
    assert content_hash(turn("a")) != content_hash([{"role": "user", "content": "a"}])
    assert normalised(turn("a")) == '[{"content":"a","role":"assistant"}]'


def test_membership_depends_on_group_and_salt_alone():
    names = [str(number) for number in range(4000)]
    sides = [side(name, salt="", dev=0.1, test=0.15) for name in names]
    # Shares of 4,000 draws lie within 4 standard deviations: 0.0047 for dev, 0.0056 for test.
    assert abs(sides.count("dev") / 4000 - 0.1) < 0.019 and abs(sides.count("test") / 4000 - 0.15) < 0.023
    more = [side(name, salt="", dev=0.2, test=0.15) for name in names]
    assert all(
        after == before or (before, after) == ("train", "dev") for before, after in zip(sides, more, strict=True)
    )
    assert [side(name, salt="x", dev=0.1, test=0.15) for name in names] != sides
    assert side("7", salt="", dev=0.1, test=0.15) == "train"  # fixed for ever: a change would leak test rows into train


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "prompt-completion": {"prompt": TURNS[:2], "completion": TURNS[2:]},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ]
    },
    "alpaca": {"instruction": "a", "input": "", "output": "b", "system": "s"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_detected_and_gives_the_same_turns(tmp_path: Path, name: str):
    path = write_rows(tmp_path / "rows.jsonl", [FORMATS[name] | {"kind": "x"}])
    read = read_rows(path)
    assert (read.format, read.detected_from, read.problems) == (name, "rows.jsonl:1", [])
    assert read.rows[0].messages == TURNS and read.rows[0].columns == {"kind": "x"}
    assert read_rows(path, format=name).rows[0].messages == TURNS
    other = next(other for other in FORMATS if other != name)
    assert "rows.jsonl:1 has no `" in read_rows(path, format=other).wrong[0]


def test_plain_text_and_the_input_of_alpaca(tmp_path: Path):
    text, asked = (
        read_rows(write_rows(tmp_path / "a.jsonl", [row])).rows[0]
        for row in ({"text": "once"}, {"instruction": "Add.", "input": "1 2", "output": "3"})
    )
    assert text.is_text and text.messages == [{"role": "text", "content": "once"}]
    assert not asked.is_text and [turn["content"] for turn in asked.messages] == ["Add.\n\n1 2", "3"]


def test_turns_of_tools_and_other_names_of_the_same_speakers(tmp_path: Path):
    turns = [("user", "a"), ("observation", "t"), ("assistant", "b"), ("human", "c"), ("tool", "t"), ("model", "d")]
    row = {"system": "s", "conversations": [{"from": who, "value": what} for who, what in turns]}
    (read,) = read_rows(write_rows(tmp_path / "a.jsonl", [row])).rows
    roles = ["system", "user", "tool", "assistant", "user", "tool", "assistant"]
    assert [turn["role"] for turn in read.messages] == roles


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is from 'narrator'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "turn 1 is from"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "does not end with an assistant turn"),
        ({"conversations": [{"from": "gpt"}]}, "turn 1 has no text"),
        ({"instruction": 3, "output": "x"}, "no text as `instruction`"),
        ({"instruction": "x", "input": 3, "output": "x"}, "no text as `input`"),
        ({"instruction": "x", "output": 3}, "turn 2 has no text"),
        ({"text": " "}, "no text as `text`"),
        ({"prompt": [], "completion": []}, "no list of turns"),
        ({"messages": "[{"}, "turns that are not JSON"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_by_line(tmp_path: Path, row: dict[str, Any], says: str):
    (wrong,) = read_rows(write_rows(tmp_path / "rows.jsonl", [chat(1), row][1:])).wrong
    assert wrong.startswith("rows.jsonl:1 ") and says in wrong


def write_as(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of the kind that the path's ending names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(
                {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
                for row in rows
            )
    else:
        write_rows(path, rows)
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, name: str):
    if kind == "csv" and name == "prompt-completion":
        rows = [{"prompt": f"a, {i}\nb", "completion": f'"{i}"', "kind": "x"} for i in range(3)]
    else:
        rows = [FORMATS[name] | {"kind": str(i)} for i in range(3)]
    plain = read_rows(write_as(tmp_path / "rows.jsonl", rows))
    read = read_rows(write_as(tmp_path / f"rows.{kind}", rows))
    assert not read.problems and read.format == plain.format
    assert [(row.messages, row.columns) for row in read.rows] == [(row.messages, row.columns) for row in plain.rows]


def test_places_of_rows_in_every_kind_of_file(tmp_path: Path):
    rows = [
        {"prompt": "a\nb", "completion": "x"},
        {"prompt": "c", "completion": " "},
        {"prompt": "d", "completion": "y"},
    ]
    assert read_rows(write_as(tmp_path / "a.csv", rows)).wrong[0].startswith("a.csv:4 ")  # 2 lines before, and a header
    assert read_rows(write_as(tmp_path / "a.json", rows)).wrong[0].startswith("a.json:6 ")  # where its object begins
    assert read_rows(write_as(tmp_path / "a.parquet", rows)).wrong[0].startswith("a.parquet#2 ")
    lines = tmp_path / "lines.json"
    write_rows(lines, rows)  # JSONL that is called .json
    assert read_rows(lines).wrong[0].startswith("lines.json:2 ")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"prompt,completion\nx,y,z\n", "a.csv:2 has 3 cells; the header has 2"),
        ("a.csv", b"prompt,completion\nx,\n", "a.csv:2 has no `completion`"),
        ("a.csv", b"prompt,completion\nx,\xff\n", "a.csv:2 is not UTF-8"),
        ("a.csv", b"prompt,prompt\nx,y\n", "a.csv:1 names a column twice: prompt"),
        ("a.parquet", b"PAR1 this is none", "a.parquet is not parquet"),
        ("a.json", b'[{"prompt": "x",\n "completion": }]', "a.json#1 is not JSON (Expecting value: line 2"),
        ("a.json", b"[3]", "a.json#1 is a JSON int"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str):
    (tmp_path / name).write_bytes(content)
    assert read_rows(tmp_path / name, format="prompt-completion").wrong[0].startswith(says)


def test_a_long_cell_and_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "a.csv").write_text("\ufeffprompt,completion\n" + "x" * 200_000 + ",y\n", encoding="utf-8")
    (row,) = read_rows(tmp_path / "a.csv").rows
    assert len(row.messages[0]["content"]) == 200_000  # the csv module's own limit is 131,072


def test_a_folder_gives_its_train_files_of_every_kind(tmp_path: Path):
    for name in ("data/train-0.parquet", "train.csv", "train/more.jsonl", "data/test-0.parquet", ".cache/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_as(tmp_path / name, [{"prompt": name, "completion": "x"}])
    (tmp_path / "dataset_infos.json").write_text("{}")
    places = [row.where for row in read_rows(tmp_path).rows]
    assert places == ["data/train-0.parquet#1", "train/more.jsonl:1", "train.csv:2"]
    assert [row.where for row in read_origin(Origin(path=tmp_path / "data", inside="data/")).rows] == [
        "data/train-0.parquet#1"
    ]


def test_a_draw_depends_on_the_row_alone_and_grows_with_the_weight():
    names = [f"{number:016x}" for number in range(4000)]
    few, more = ({name for name in names if drawn(name, weight=weight, salt="")} for weight in (0.3, 0.6))
    assert few < more and all(drawn(name, weight=1.0, salt="") for name in names)
    assert abs(len(few) / 4000 - 0.3) < 0.029  # 4 standard deviations of a share of 4,000 draws
    train = [name for name in names if side(name, salt="", dev=0.4, test=0.4) == "train"]
    kept = sum(name in few for name in train) / len(train)
    assert abs(kept - 0.3) < 0.07  # 4 of about 800: the draw does not follow the split
