"""Turns into token ids, and which of them are completion: the one place that renders a chat template.

Token ids of a row are made here once, in prepare; train, calibrate and evaluate read them. The completions are found
in the first of these ways that is sound for the row: the template's own generation markers; TRL's training template for
it, if that renders the row to the same ids; the token difference of prefixes. Where all fail because a template renders
earlier turns differently from the last (Qwen3 drops their thinking), each assistant turn becomes a sample of its own:
the true history up to it, rendered by the model's own template, and only that turn is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from jinja2 import TemplateError

from recipes.data.turns import Message
from tasks.jobs.text.conversation import Conversation, RowError, behind_thinking, called
from tasks.jobs.text.templates import GENERATION, chatml, end_of_turn, generation_prompt, training_template
from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.runtime.process.errors import StageError

ONE_A_TURN: Final = "one sample a turn"
Way = Literal["generation markers", "TRL's training template", "prefixes", "one sample a turn", "all tokens"]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Token ids of a sample; mask[i] is True where token i belongs to a trained assistant turn, end-of-turn included.

    Attributes:
        prompt_ids: The history before the last turn with the generation prompt: what an answer is decoded from.
        way: How the trained tokens were found.
    """

    input_ids: list[int]
    mask: list[bool]
    prompt_ids: list[int]
    way: Way

    @property
    def skewed(self) -> bool:
        """The last turn is trained after another prompt than its answer is decoded from (only markers allow it)."""
        return self.input_ids[: len(self.prompt_ids)] != self.prompt_ids


class Sample(NamedTuple):
    """A sample of a row: its turns, their tokens.

    Attributes:
        turn: Number in the row of the one turn that is trained; 0 where all are.
        dropped: Leading turns that were cut off.
        last: Ends with the row's last turn: an answer to it can be scored.
        lost: Tokens that the cut turns had.
    """

    turns: list[Message]
    rendered: Rendered
    turn: int
    dropped: int
    last: bool
    lost: int


class TooLong(NamedTuple):
    """A sample whose last exchange alone is over the limit, and the tokens of all of it."""

    tokens: int


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A tokenizer with a chat template whose turns end with one known token.

    Attributes:
        tokenizer: A PreTrainedTokenizerBase with a chat template (its stubs do not know what a call returns).
        end_of_turn: Id of the special token that ends an assistant turn.
        opening: Ids of the generation prompt.
        special: Ids of all special tokens: some templates end tool calls with another one.
        training: TRL's training template where it has one for exactly this template.
    """

    tokenizer: Any
    end_of_turn: int
    opening: list[int]
    special: frozenset[int]
    training: str | None

    @classmethod
    def open(cls, folder: Path, *, template: str | None = None) -> Renderer:
        """The tokenizer of a model folder, with its own template or, if it has none, the one given.

        Args:
            folder: Model folder.
            template: `chatml`, the text of a Jinja template, or None.

        Raises:
            StageError: No tokenizer, no template, two templates, or turns that end with no special token.
        """
        tokenizer = _with_template(folder, template)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= {tokenizer.eos_token_id} - {None}
        try:
            ending = end_of_turn(tokenizer, folder, special=special)
            opening = generation_prompt(tokenizer)
        except (TemplateError, TypeError, ValueError) as error:  # ValueError: the answer is not in the text
            raise StageError.of(
                what=f"the chat template cannot render a question and its answer: {error}",
                where=str(folder),
                why="without it the completions of a row cannot be found",
                next="correct the template (model.chat_template, or chat_template.jinja of the base)",
            ) from None
        return cls(
            tokenizer=tokenizer,
            end_of_turn=ending,
            opening=opening,
            special=frozenset(special),
            training=training_template(tokenizer),
        )

    def samples(self, chat: Conversation, *, max_length: int) -> list[Sample | TooLong]:
        """The samples that a row is trained on and scored by: one, or one per assistant turn, each cut to fit.

        Raises:
            RowError: The template refuses the turns, or no way gives a sound mask.
        """
        try:
            return [_fitted(chat, self.render, max_length=max_length, turn=0, last=True)]
        except RowError:
            if len(chat.answered) == 1:
                raise
        return [
            _fitted(
                chat.until(number), self.render_last, max_length=max_length, turn=number, last=number == len(chat.turns)
            )
            for number in chat.answered
        ]

    def render(self, chat: Conversation) -> Rendered:
        """Token ids of a conversation, every assistant turn trained.

        Raises:
            RowError: The template refuses the turns, or no way gives a sound mask.
        """
        ids = self._ids(chat)
        prompt = self.prompt(chat)
        template = self.tokenizer.get_chat_template(tools=chat.tools)
        marked: Way = "generation markers" if GENERATION.search(template) else "TRL's training template"
        source = template if marked == "generation markers" else self.training
        if source and (mask := self._by_markers(chat, ids, source)):
            return self._checked(chat, Rendered(input_ids=ids, mask=mask, prompt_ids=prompt, way=marked))
        mask = [False] * len(ids)
        for number in chat.answered:
            turn = self._difference(chat.until(number), ids)
            mask[turn.start : turn.stop] = [True] * len(turn)
        return self._checked(chat, Rendered(input_ids=ids, mask=mask, prompt_ids=prompt, way="prefixes"))

    def render_last(self, chat: Conversation) -> Rendered:
        """Token ids of a conversation with only its last turn trained: the tokens after the history.

        Raises:
            RowError: The template refuses the turns, or the history is not a prefix of the whole.
        """
        ids = self._ids(chat)
        turn = self._difference(chat, ids)
        mask = [place in turn for place in range(len(ids))]
        return self._checked(chat, Rendered(input_ids=ids, mask=mask, prompt_ids=self.prompt(chat), way=ONE_A_TURN))

    def prompt(self, chat: Conversation) -> list[int]:
        """Token ids of the history before the last turn, with the generation prompt."""
        return self._ids(chat.until(len(chat.turns) - 1), add_generation_prompt=True)

    def marked_text(self, row: Rendered) -> str:
        """The row as text, trained tokens between ⟦ and ⟧."""
        parts, inside = [], False
        for token, trained in zip(row.input_ids, row.mask, strict=True):
            if trained != inside:
                parts.append("⟦" if trained else "⟧")
                inside = trained
            parts.append(self.tokenizer.decode([token]))
        return "".join(parts) + ("⟧" if inside else "")

    def completion(self, rendered: Rendered) -> str:
        """The last turn as text, without special tokens and thinking: as a model's answer is read."""
        start, stop = _spans(rendered.mask)[-1]
        return behind_thinking(self.tokenizer.decode(rendered.input_ids[start:stop], skip_special_tokens=True))

    def _render(self, chat: Conversation, **options: Any) -> Any:
        """What apply_chat_template gives; RowError with the turn from which on the template refuses."""
        if not chat.turns:
            raise RowError("turn 1: an assistant turn with nothing before it, which no template generates")
        try:
            return self.tokenizer.apply_chat_template(chat.turns, tools=chat.tools, tokenize=True, **options)
        except (TemplateError, TypeError) as error:  # TypeError: text + None, or an object that is not JSON
            number = len(chat.turns)
            while number > 1 and self._refuses(chat.until(number - 1)):
                number -= 1
            raise RowError(f"turn {number}: is refused by the chat template: {error}") from None

    def _refuses(self, chat: Conversation) -> bool:
        try:
            self.tokenizer.apply_chat_template(chat.turns, tools=chat.tools, tokenize=False)
        except (TemplateError, TypeError):
            return True
        return False

    def _ids(self, chat: Conversation, **options: bool) -> list[int]:
        return self._render(chat, return_dict=False, **options)

    def _by_markers(self, chat: Conversation, ids: list[int], template: str) -> list[bool] | None:
        """Mask from a template's generation markers, each span from the generation prompt to the turn's end.

        Markers may hold the line ends behind both (TRL's for Qwen2.5) or a whole header: a model never writes these.
        None where the template renders other ids than the model's own, or leaves out the end of a turn.
        """
        if not self.tokenizer.is_fast:  # no map from characters to tokens
            return None
        try:
            both = self._render(chat, return_dict=True, return_assistant_tokens_mask=True, chat_template=template)
        except RowError:
            return None
        if both["input_ids"] != ids:
            return None
        mask = [bool(inside) for inside in both["assistant_masks"]]
        ends = {place for place, token in enumerate(ids) if mask[place] and token == self.end_of_turn}
        for start, stop in _spans(mask):
            begin = self._behind_opening(ids, start, stop)
            mask[start:begin] = [False] * (begin - start)
            end = self._end(ids, start, stop)
            if end is None and stop < len(ids) and ids[stop] == self.end_of_turn:
                end, mask[stop] = stop, True
            if end is not None:
                mask[end + 1 : stop] = [False] * len(mask[end + 1 : stop])
                ends.add(end)
        return mask if len(ends) >= len(chat.answered) else None

    def _difference(self, chat: Conversation, ids: list[int]) -> range:
        """Places in `ids` of the last turn of `chat`, up to the token that ends it.

        Verified: the history with the generation prompt, and the turns up to this one's end, are prefixes of `ids`.
        """
        number = len(chat.turns)
        before, until = self.prompt(chat), self._ids(chat)
        last = self._end(until, len(before), len(until))
        stop = len(before) if last is None else last + 1
        if until[: len(before)] != before:
            raise RowError(
                f"turn {number}: it does not begin with the tokens of the history and the generation prompt, by the "
                "template or by a token that spans the seam, so the completion's tokens cannot be found"
            )
        if ids[:stop] != until[:stop]:
            raise RowError(f"turn {number}: the template renders the turns up to it differently from the whole row")
        if last is None:
            raise RowError(f"turn {number}: no special token ends it, so the model would not learn to stop")
        if last == len(before):
            raise RowError(f"turn {number}: the template renders nothing of it")
        return range(len(before), stop)

    def _behind_opening(self, ids: list[int], start: int, stop: int) -> int:
        """Where the generation prompt, or as much of it as stands there, ends in ids[start:stop]; else `start`."""
        for length in range(len(self.opening), 0, -1):
            for end in range(start + 1, min(start + length, stop) + 1):
                if ids[max(0, end - length) : end] == self.opening[:length]:
                    return end
        return start

    def _end(self, ids: list[int], start: int, stop: int) -> int | None:
        """Place of the token that ends a turn in ids[start:stop]; behind it only white space and special tokens.

        The end-of-turn token, else the last special one (`<|eom_id|>`, `<|call|>` behind tool calls).
        """
        last_special = None
        for place in range(stop - 1, start - 1, -1):
            if ids[place] == self.end_of_turn:
                return place
            if ids[place] in self.special:
                last_special = place if last_special is None else last_special
            elif self.tokenizer.decode([ids[place]]).strip():
                break
        return last_special

    def _checked(self, chat: Conversation, rendered: Rendered) -> Rendered:
        """Pass it on; RowError for a doubled beginning-of-text token, or a tool call that the template leaves out."""
        ids, mask, bos = rendered.input_ids, rendered.mask, self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RowError("begins with two beginning-of-text tokens")
        trained = chat.answered if rendered.way != ONE_A_TURN else [len(chat.turns)]
        if any(chat.turns[number - 1].get("tool_calls") for number in trained):
            text = self.tokenizer.decode([token for token, inside in zip(ids, mask, strict=True) if inside])
            for number in trained:
                for name in called(chat.turns[number - 1]):
                    if name not in text:
                        raise RowError(f"turn {number}: the template leaves out its call of {name}")
        return rendered


def _with_template(folder: Path, template: str | None) -> Any:
    """The folder's tokenizer with the chat template to render by.

    Raises:
        StageError: No tokenizer, no template, or two templates.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise StageError.of(
            what="the base folder has no tokenizer",
            where=str(folder),
            why="rows cannot be tokenised",
            next="add its files",
        )
    tokenizer = load_tokenizer(folder)
    if template and tokenizer.chat_template:
        raise StageError.of(
            what="the base has a chat template of its own and the recipe names another one",
            where=str(folder),
            why="the base was trained with its own; a second one would undo that",
            next="remove model.chat_template from the recipe",
        )
    if template:
        tokenizer.chat_template = chatml(tokenizer) if template == "chatml" else template
    if not tokenizer.chat_template:
        raise StageError.of(
            what="the base has no chat template",
            where=str(folder),
            why="without one it is unknown where a turn begins and ends",
            next="write model.chat_template: chatml (or the path of a Jinja file) into the recipe",
        )
    return tokenizer


def _fitted(
    chat: Conversation, render: Callable[[Conversation], Rendered], *, max_length: int, turn: int, last: bool
) -> Sample | TooLong:
    """The longest version within `max_length` tokens, leading exchanges dropped."""
    tokens = 0
    for shorter in chat.shorter():
        rendered = render(shorter)
        length = len(rendered.input_ids)
        tokens = tokens or length
        if length <= max_length:
            dropped = len(chat.turns) - len(shorter.turns)
            return Sample(shorter.turns, rendered, turn, dropped, last, lost=tokens - length)
    return TooLong(tokens)


def _spans(mask: list[bool]) -> list[tuple[int, int]]:
    """[start, stop) of every run of True."""
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
