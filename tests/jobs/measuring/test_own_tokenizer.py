"""An external model's tokenizer: told by the ids that it gives; rows and prompts in its own tokens and template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tasks.jobs import prepare
from tasks.jobs.measuring.own_tokenizer import another, read_rows_as
from tasks.jobs.measuring.teacher_forcing import TokenRow, read_rows
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, write_jsonl
from tests.jobs.test_prepare import PARAMS as PREPARE
from tests.tiny import OTHER, PLAIN, other_tokenizer, write_base

FORGETFUL = (  # thinking of earlier turns is left out, as Qwen3's template does
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
    "{{- message['content'] if loop.last else message['content'].split('</think>')[-1] -}}{{- '<|stop|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


THOUGHT = "<think>thinking .</think>"


def turns(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"what is {number} ?"},
        {"role": "assistant", "content": f"{THOUGHT} blue {number}"},
        {"role": "user", "content": "and the sky ?"},
        {"role": "assistant", "content": f"{THOUGHT} the sky is red {number}"},
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and dataset/: conversations of two exchanges, and plain texts."""
    folder = tmp_path_factory.mktemp("own")
    base = write_base(folder / "base")
    chats = write_jsonl(folder / "chats.jsonl", [{"messages": turns(number)} for number in range(40)])
    texts = write_jsonl(folder / "texts.jsonl", [{"text": f"the sky is blue {i} ."} for i in range(20)])
    params = PREPARE | {"sources": [{"format": "auto", "weight": 1.0, "domain": None}] * 2}
    inputs = {"data": chats, "data-1": texts, "tokenizer": base}
    prepare.run(make_job("prepare", folder / "dataset", params=params, **inputs))
    return folder


@pytest.fixture(scope="module")
def rows(world: Path) -> list[TokenRow]:
    return read_rows(world / "dataset", "dev", "test")


def read(folder: Path, world: Path, rows: list[TokenRow], chat_template: str | None = None, longest: int | None = None):
    return read_rows_as(
        folder, world / "dataset", rows, why="another tokenizer", chat_template=chat_template, longest=longest
    )


def test_the_same_ids_are_the_same_tokenizer_whatever_its_files_say(world: Path, rows: list[TokenRow], tmp_path: Path):
    assert another(world / "base", world / "dataset", rows) is None
    # Without markers the template renders the same; without any, the dataset's stands in.
    assert another(write_base(tmp_path / "plain", chat_template=PLAIN), world / "dataset", rows) is None
    assert another(write_base(tmp_path / "none", chat_template=False), world / "dataset", rows) is None
    why = another(write_base(tmp_path / "spoken", chat_template=PLAIN.replace("\n", " ")), world / "dataset", rows)
    assert why is not None and why.startswith("another tokenizer: the base's vocabulary, but ")
    other = another(write_base(tmp_path / "o", tokenizer=other_tokenizer()), world / "dataset", rows)
    assert other is not None and f"{len(rows)} of {len(rows)} rows get other token ids" in other
    assert other.startswith("another tokenizer: 3")


def test_rows_are_read_with_its_own_template_and_end(world: Path, rows: list[TokenRow], tmp_path: Path):
    folder = write_base(tmp_path / "other", tokenizer=other_tokenizer())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9]}))
    own = AutoTokenizer.from_pretrained(folder)
    reading = read(folder, world, rows)
    assert [row.row for row in reading.rows] == [row.row for row in rows]
    for before, after in zip(rows, reading.rows, strict=True):
        text = own.decode(after.ids)
        counted = own.decode([token for token, inside in zip(after.ids, after.counted, strict=True) if inside])
        assert (after.group, after.split, after.answer) == (before.group, before.split, before.answer)
        if before.prompt_ids:
            assert text.startswith("<|user|>what is ") and text.endswith(f"{before.answer}<|stop|>")
            number = before.answer.rsplit(maxsplit=1)[-1]
            assert counted == f"{THOUGHT} blue {number}<|stop|>{THOUGHT}{before.answer}<|stop|>"
            assert own.decode(after.prompt_ids) == text[: -len(f"{THOUGHT}{before.answer}<|stop|>")]
        else:
            first = len(own.decode(after.ids[:1]))
            assert counted == text[first:] and text.endswith(" .<|stop|>")
            assert after.prompt_ids == []
    assert {row.row for row in reading.prompts} == {row.row for row in rows if row.prompt_ids}
    assert reading.ends == [0, 9]
    assert reading.greedy(max_new_tokens=7).eos_token_id == [0, 9]
    assert 0 < len(reading.prompts) < len(rows)


def test_a_template_that_forgets_earlier_turns_gives_a_piece_a_turn(world: Path, rows: list[TokenRow], tmp_path: Path):
    folder = write_base(tmp_path / "forgetful", tokenizer=other_tokenizer(chat_template=FORGETFUL))
    reading = read(folder, world, rows)
    chats = [row for row in rows if row.prompt_ids]
    texts = len(rows) - len(chats)
    assert len(reading.rows) == 2 * len(chats) + texts
    own = AutoTokenizer.from_pretrained(folder)
    pieces = [row for row in reading.rows if row.row == chats[0].row]
    trained = [
        own.decode([t for t, inside in zip(piece.ids, piece.counted, strict=True) if inside]) for piece in pieces
    ]
    number = chats[0].answer.rsplit(maxsplit=1)[-1]
    assert trained == [f"{THOUGHT} blue {number}<|stop|>", f"{THOUGHT}{chats[0].answer}<|stop|>"]
    prompt = next(row for row in reading.prompts if row.row == chats[0].row).prompt_ids
    assert own.decode(prompt) == (
        f"<|user|>what is {number} ?<|stop|><|assistant|> blue {number}<|stop|>"
        "<|user|>and the sky ?<|stop|><|assistant|>"
    )


def test_without_a_template_it_is_refused_or_chatml(world: Path, rows: list[TokenRow], tmp_path: Path):
    folder = write_base(tmp_path / "bare", tokenizer=other_tokenizer(chat_template=None))
    assert another(folder, world / "dataset", rows) is not None
    with pytest.raises(StageError, match="another tokenizer and no chat template") as refused:
        read(folder, world, rows)
    assert "chat_template: chatml" in refused.value.problem.next
    reading = read(folder, world, rows, chat_template="chatml")
    own = AutoTokenizer.from_pretrained(folder)
    assert own.decode(reading.prompts[0].prompt_ids).endswith("<|im_start|>assistant\n")
    assert reading.ends == [0]


def test_what_it_cannot_take_is_refused_with_the_rows(world: Path, rows: list[TokenRow], tmp_path: Path):
    strict = "{%- if messages|length > 2 -%}{{ raise_exception('one exchange only') }}{%- endif -%}"
    folder = write_base(tmp_path / "strict", tokenizer=other_tokenizer(chat_template=strict + OTHER))
    with pytest.raises(StageError, match="cannot render") as refused:
        read(folder, world, rows)
    assert "one exchange only" in refused.value.problem.why
    folder = write_base(tmp_path / "other", tokenizer=other_tokenizer())
    with pytest.raises(StageError, match="longer than the model's context of 12 tokens"):
        read(folder, world, rows, longest=12)
