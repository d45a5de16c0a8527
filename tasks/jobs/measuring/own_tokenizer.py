"""An external model's tokenizer and template: does it read the rows as the base's does, and how does it read them?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from transformers import AutoConfig, GenerationConfig

from recipes.data.formats import TEXT
from recipes.data.rows import SHOWN, first_lines
from recipes.data.turns import Message
from tasks.jobs.measuring.teacher_forcing import TokenRow
from tasks.jobs.text.chat_template import NO_SETTINGS, ChatTemplate, TemplateSettings
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.encoding import encode
from tasks.jobs.text.rendering import Rendered, Renderer
from tasks.jobs.text.tokenizer import load_tokenizer, text_ids, with_end
from tasks.runtime.process.errors import StageError


class RowSource(NamedTuple):
    """What a row was made from.

    Attributes:
        turns: Its turns, or the one plain text.
        tools: Its JSON schemas, None where it has none.
        turn: Number of the one turn that is trained; 0 where all are.
    """

    turns: list[Message]
    tools: list[dict[str, Any]] | None
    turn: int

    @property
    def is_text(self) -> bool:
        """A plain text: no template renders it."""
        return self.turns[0]["role"] == TEXT

    @property
    def chat(self) -> Conversation:
        """As a template gets it."""
        return Conversation.of(self.turns, self.tools)


@dataclass(frozen=True, kw_only=True)
class OwnReading:
    """The rows as a model with another tokenizer reads them.

    Attributes:
        why: `another tokenizer: ...`, in one sentence.
        tokenizer: Its tokenizer, with its template.
        rows: Every row in its tokens. A row is several where its template renders earlier turns differently
            from the last: each assistant turn then comes after its own history.
        prompts: The rows that have a prompt, with its tokens as prompt_ids.
        ends: Ids that end an answer.
    """

    why: str
    tokenizer: Any
    rows: list[TokenRow]
    prompts: list[TokenRow]
    ends: list[int]

    def greedy(self, *, max_new_tokens: int) -> GenerationConfig:
        """Plain greedy decoding that ends with the model's own turn."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self.ends, pad_token_id=self.ends[0]
        )


def own_reading(
    folder: Path, dataset: Path, rows: Sequence[TokenRow], *, chat_template: str | None, trusted: bool
) -> OwnReading | None:
    """The rows as the model in this folder reads them, where its tokenizer is another one; else None.

    Raises:
        StageError: As of `read_rows_as`.
    """
    why = another(folder, dataset, rows)
    if why is None:
        return None
    text = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trusted).get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    return read_rows_as(folder, dataset, rows, why=why, chat_template=chat_template, longest=longest)


def another(folder: Path, dataset: Path, rows: Sequence[TokenRow]) -> str | None:
    """Why the tokenizer of a model folder is another one than the dataset's; None where all token ids are the same.

    What counts is what it does: rows and prompts through its own template, or the dataset's where it has none.
    """
    own, theirs = load_tokenizer(folder), load_tokenizer(dataset / "tokenizer")
    if not own.chat_template:
        own.chat_template = theirs.chat_template
    sources = _Sources(dataset)
    template = ChatTemplate.of(own, settings=_settings(own.chat_template, dataset, theirs))
    unlike = [row.row for row in rows if not _same(row, sources[row.row], template, theirs)]
    if not unlike:
        return None
    if own.get_vocab() == theirs.get_vocab():
        return f"another tokenizer: the base's vocabulary, but {len(unlike)} of {len(rows)} rows are rendered otherwise"
    return (
        f"another tokenizer: {len(own):,} tokens, the base's has {len(theirs):,}; {len(unlike)} of {len(rows)} rows "
        "get other token ids"
    )


def _settings(chat_template: Any, dataset: Path, theirs: Any) -> TemplateSettings:
    """What the recipe says to the base's template: for that one alone, another template has other arguments."""
    return TemplateSettings.read(dataset / "tokenizer") if chat_template == theirs.chat_template else NO_SETTINGS


def _same(row: TokenRow, source: RowSource, own: ChatTemplate, theirs: Any) -> bool:
    if source.is_text:
        text = source.turns[0]["content"]
        return text_ids(own.tokenizer, text) == text_ids(theirs, text)
    chat = source.chat
    try:
        shaped = own.shaped(chat, trained=[len(chat.turns)] if source.turn else chat.trained, markers=False)
        whole, prompt = encode(own.tokenizer, [shaped.marked.text, own.prompt(shaped.chat)])
    except RowError:
        return False
    return whole.ids == row.ids and (not row.prompt_ids or prompt.ids == row.prompt_ids)


def read_rows_as(
    folder: Path,
    dataset: Path,
    rows: Sequence[TokenRow],
    *,
    why: str,
    chat_template: str | None,
    longest: int | None,
) -> OwnReading:
    """All rows through the tokenizer and template of a model folder.

    Args:
        folder: The model.
        dataset: The dataset: turns and texts.
        rows: Its rows as the base's tokenizer reads them.
        why: The answer of `another`.
        chat_template: `chatml` for a tokenizer without a template of its own, or None.
        longest: Tokens that the model was made for.

    Raises:
        StageError: It has no template; its template refuses rows; rows are longer than the model's context.
    """
    own, theirs = load_tokenizer(folder), load_tokenizer(dataset / "tokenizer")
    if chat_template is None and not own.chat_template:
        raise StageError.of(
            what="the model has another tokenizer and no chat template",
            where=str(folder),
            why="turns cannot be rendered as it expects them",
            next="put its chat_template.jinja into the folder, or write evaluate.external.NAME as "
            "{path: ..., chat_template: chatml}",
        )
    renderer = Renderer.open(folder, template=chat_template, settings=_settings(own.chat_template, dataset, theirs))
    sources = _Sources(dataset)
    end = theirs.eos_token_id
    own_rows: list[TokenRow] = []
    prompts: list[TokenRow] = []
    wrong: list[str] = []
    for row in rows:
        try:
            samples = list(_read(row, sources[row.row], renderer, ended=row.ids[-1] == end))
        except RowError as error:
            wrong.append(f"{row.row} {error}")
            continue
        own_rows += samples
        if row.prompt_ids:
            prompts.append(samples[-1])
    if wrong:
        raise _unreadable(wrong, folder)
    if longest is not None and (long := [row.row for row in own_rows if len(row.ids) > longest]):
        raise _too_long(long, folder, longest=longest)
    return OwnReading(
        why=why, tokenizer=renderer.tokenizer, rows=own_rows, prompts=prompts, ends=_ends(folder, renderer)
    )


def _read(row: TokenRow, source: RowSource, renderer: Renderer, *, ended: bool) -> list[TokenRow]:
    if source.is_text:
        ids = text_ids(renderer.tokenizer, source.turns[0]["content"])
        if ended:
            ids = with_end(renderer.tokenizer, ids)
        return [row.read_as(ids, counted=[False, *[True] * (len(ids) - 1)], prompt_ids=[])]
    return [
        row.read_as(
            rendered.input_ids,
            counted=[False, *rendered.mask[1:]],
            prompt_ids=rendered.prompt_ids if row.prompt_ids else [],
        )
        for rendered in _rendered(renderer, source)
    ]


def _rendered(renderer: Renderer, source: RowSource) -> list[Rendered]:
    chat = source.chat
    if source.turn:
        return [renderer.render_last(chat)]
    try:
        return [renderer.render(chat)]
    except RowError:
        if chat.trained == [len(chat.turns)]:
            raise
    return [renderer.render_last(chat.until(number)) for number in chat.trained]


class _Sources:
    """What each row of dev and test was made from, by name; read from Arrow columns when it is asked for."""

    def __init__(self, dataset: Path) -> None:
        columns, held_out = ["row", "messages", "tools", "turn"], [("split", "in", ("dev", "test"))]
        self._table = pq.read_table(dataset / "rows.parquet", columns=columns, filters=held_out)
        self._places = {name: place for place, name in enumerate(self._table["row"].to_pylist())}

    def __getitem__(self, row: str) -> RowSource:
        """The row of this name."""
        messages, tools, turn = (self._table[name][self._places[row]].as_py() for name in ("messages", "tools", "turn"))
        return RowSource(json.loads(messages), json.loads(tools or "null"), turn)


def _ends(folder: Path, renderer: Renderer) -> list[int]:
    """The end of its turn first, then what its generation_config.json names."""
    ends = [renderer.end_of_turn]
    if (folder / "generation_config.json").exists():
        stored = GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
        ends += stored if isinstance(stored, list) else [] if stored is None else [stored]
    return list(dict.fromkeys(ends))


def _unreadable(wrong: Sequence[str], folder: Path) -> StageError:
    return StageError.of(
        what=f"its chat template cannot render {len(wrong)} row(s)",
        where=str(folder),
        why=f"an answer needs the same history as every other arm's:{first_lines(wrong)}",
        next="give a template that takes such turns (chat_template.jinja of that folder), or leave the model out",
    )


def _too_long(long: Sequence[str], folder: Path, *, longest: int) -> StageError:
    return StageError.of(
        what=f"{len(long)} row(s) are longer than the model's context of {longest} tokens",
        where=f"{folder / 'config.json'}: rows {', '.join(long[:SHOWN])}",
        why="its tokenizer makes more tokens of them than the base's",
        next="lower data.max_length, or leave the model out",
    )
