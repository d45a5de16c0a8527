"""Rows: formats, content hash, split."""

import json
from pathlib import Path

from recipes.rows import content_hash, normalised, read_rows, side
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


def test_hash_ignores_white_space_and_unicode_form_but_not_case():
    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    assert content_hash(turn(" a\n b\t")) == content_hash(turn("a b"))
    assert content_hash(turn("e\u0301")) == content_hash(turn("\u00e9"))
    assert content_hash(turn("A")) != content_hash(turn("a"))
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
