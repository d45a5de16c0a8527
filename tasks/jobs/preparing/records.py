"""Rows of the spool -> records of rows.parquet: rendered, tokenised, cut to fit, with what is told about them."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from recipes.data.formats import TEXT
from tasks.jobs.preparing.spool import SpooledRow
from tasks.jobs.text.completions import SeamError
from tasks.jobs.text.conversation import Conversation, RowError, behind_thinking
from tasks.jobs.text.rendering import Renderer, Sample, TooLong
from tasks.jobs.text.tokenizer import begun_once, with_end

ROWS = pa.schema(
    [
        ("row", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("domain", pa.string()),
        ("messages", pa.string()),
        ("tools", pa.string()),  # JSON; empty where the row has none
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.bool_())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("columns", pa.string()),
        ("dropped_turns", pa.int32()),
        ("source", pa.string()),  # file and line
        ("turn", pa.int32()),  # number of the one turn that is trained; 0 where all assistant turns are
    ]
)
Record = dict[str, Any]


class Keys(NamedTuple):
    """What makes two records equal: their turns (16 bytes) or their tokens (16); and the identity columns (8)."""

    turns: bytes
    tokens: bytes
    identity: bytes


@dataclass(kw_only=True)
class Tally:
    """What is told about rows that were rendered.

    Attributes:
        ways: Rows with turns by the way in which their trained tokens were found.
        forms: Rows with turns by the form in which the template wants them, where it is another one than the row's.
        lost: Tokens that each cut sample lost.
        too_long: Tokens of each sample whose last exchange alone is over the limit.
        single: Samples of one turn each, their tokens, and the tokens of those among them that hold all turns.
        texts: Plain texts.
    """

    ways: Counter[str] = field(default_factory=Counter[str])
    forms: Counter[str] = field(default_factory=Counter[str])
    lost: array[int] = field(default_factory=lambda: array("q"))
    too_long: array[int] = field(default_factory=lambda: array("q"))
    single: Counter[str] = field(default_factory=Counter[str])
    texts: int = 0

    def add(self, other: Tally) -> None:
        """Those of other rows."""
        self.ways.update(other.ways)
        self.forms.update(other.forms)
        self.lost += other.lost
        self.too_long += other.too_long
        self.single.update(other.single)
        self.texts += other.texts


@dataclass(kw_only=True)
class RenderedRows:
    """Records of some rows, in the rows' order; samples of one row by name.

    Attributes:
        records: As rows.parquet holds them.
        keys: Of each record.
        first: The first record that has turns (False) and the first that is a plain text (True).
        tally: Of all rows.
        wrong: `file.jsonl:LINE what is wrong with it`, one per row that has no sound mask.
        seam: The first of them whose prompt is no beginning of what is trained.
    """

    records: list[Record] = field(default_factory=list[Record])
    keys: list[Keys] = field(default_factory=list[Keys])
    first: dict[bool, Record] = field(default_factory=dict[bool, Record])
    tally: Tally = field(default_factory=Tally)
    wrong: list[str] = field(default_factory=list[str])
    seam: SpooledRow | None = None


def render(rows: Sequence[SpooledRow], renderer: Renderer, *, max_length: int) -> RenderedRows:
    """Records of rows; their texts are tokenised together."""
    rendered = RenderedRows()
    samples = _samples(rows, renderer, max_length=max_length)
    texts = _texts([row for row in rows if row.is_text], renderer, max_length=max_length, tally=rendered.tally)
    for row in rows:
        if row.is_text:
            records = [next(texts)]
        else:
            fitted = next(samples)
            if isinstance(fitted, RowError):
                rendered.wrong.append(f"{row.where} {fitted}")
                rendered.seam = rendered.seam or (row if isinstance(fitted, SeamError) else None)
                continue
            records = _sampled(row, fitted, renderer, rendered.tally)
        for record in sorted(records, key=lambda record: record["row"]):
            rendered.first.setdefault(row.is_text, record)
            rendered.records.append(record)
            rendered.keys.append(_keys(record, row.identity))
    return rendered


def _samples(
    rows: Sequence[SpooledRow], renderer: Renderer, *, max_length: int
) -> Iterator[list[Sample | TooLong] | RowError]:
    """Of each row with turns, in their order."""
    chats: list[Conversation | RowError] = []
    for row in rows:
        if not row.is_text:
            try:
                chats.append(Conversation.of(row.messages, row.tools))
            except RowError as error:
                chats.append(error)
    whole = [chat for chat in chats if isinstance(chat, Conversation)]
    made = renderer.samples_of(whole, max_length=max_length, scored=True)
    return (chat if isinstance(chat, RowError) else next(made) for chat in chats)


def _sampled(row: SpooledRow, fitted: Sequence[Sample | TooLong], renderer: Renderer, tally: Tally) -> list[Record]:
    """One record of a row, or one per trained turn; they share its group."""
    samples = [sample for sample in fitted if isinstance(sample, Sample)]
    tally.too_long.extend(sample.tokens for sample in fitted if isinstance(sample, TooLong))
    tally.lost.extend(sample.lost for sample in samples if sample.dropped)
    tally.ways.update({sample.rendered.way for sample in samples})
    tally.forms.update({sample.rendered.form for sample in samples} - {""})
    for sample in samples:
        if sample.turn:
            tokens = len(sample.rendered.input_ids)
            tally.single.update(samples=1, tokens=tokens, last_tokens=tokens if sample.last else 0)
    return [_record(row, sample, renderer) for sample in samples]


def _record(row: SpooledRow, sample: Sample, renderer: Renderer) -> Record:
    """What rows.parquet holds of a sample. Only the one with the row's last turn has a prompt, to be answered."""
    rendered, turn = sample.rendered, sample.turns[-1]
    answer = behind_thinking(turn.get("content") or "")
    if turn.get("tool_calls"):  # the text of a call is the template's
        answer = renderer.completion(rendered)
    return _common(row) | {
        "row": f"{row.name}.{sample.turn}" if sample.turn else row.name,
        # keys in their order: templates write calls as they are
        "messages": json.dumps(sample.turns, ensure_ascii=False),
        "tools": json.dumps(row.tools, ensure_ascii=False) if row.tools else "",
        "input_ids": rendered.input_ids,
        "completion_mask": rendered.mask,
        "prompt_ids": rendered.prompt_ids if sample.last else [],
        "answer": answer if sample.last else "",
        "dropped_turns": sample.dropped,
        "turn": sample.turn,
    }


def _texts(rows: Sequence[SpooledRow], renderer: Renderer, *, max_length: int, tally: Tally) -> Iterator[Record]:
    """Tokens of every text as the tokenizer makes them, then the end-of-text token; cut at max_length.

    `prompt_ids` and `answer` are empty: evaluate measures loss and KL on these rows and decodes no answers.
    """
    tokenizer = renderer.tokenizer
    texts = [row.messages[0]["content"] for row in rows]
    tokens: list[list[int]] = tokenizer(texts)["input_ids"] if texts else []
    for row, text, without_end in zip(rows, texts, tokens, strict=True):
        ids = with_end(tokenizer, begun_once(tokenizer, without_end))
        kept = ids[:max_length]
        if len(kept) < len(ids):
            tally.lost.append(len(ids) - len(kept))
            text = tokenizer.decode(kept)
        tally.texts += 1
        yield _common(row) | {
            "row": row.name,
            "messages": json.dumps([{"role": TEXT, "content": text}], ensure_ascii=False, sort_keys=True),
            "tools": "",
            "input_ids": kept,
            "completion_mask": [True] * len(kept),
            "prompt_ids": [],
            "answer": "",
            "dropped_turns": 0,
            "turn": 0,
        }


def _common(row: SpooledRow) -> Record:
    return {
        "group": row.group,
        "split": row.split,
        "domain": row.domain,
        "columns": json.dumps(row.columns, ensure_ascii=False),
        "source": row.where,
    }


def _keys(record: Record, identity: str) -> Keys:
    turns = json.dumps([json.loads(record["messages"]), record["tools"]], sort_keys=True).encode()
    tokens = array("i", record["input_ids"]).tobytes()
    return Keys(_digest(turns, 16), _digest(tokens, 16), _digest(identity.encode(), 8))


def _digest(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()
