"""Turns into token ids, and which of them are completion: the one place that renders a chat template.

Token ids of a row are made here once, in prepare; train, calibrate and evaluate read them. The completions are found
in the first of these ways that is sound for the row: the template's own generation markers; TRL's training template,
if that renders the row to the same text; the token difference of prefixes. Where all fail because a template renders
earlier turns differently from the last (Qwen3 drops their thinking), each trained turn becomes a sample of its own:
the true history up to it, rendered by the model's own template, and only that turn is trained.

Texts come first (`chat_template`), tokens second: what makes a sample is a generator that yields texts and is sent
their tokens (`encoding`), so that many rows are tokenised in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from recipes.data.turns import Message
from recipes.models.chat_template import misfit
from tasks.jobs.text.chat_template import NO_SETTINGS, ChatTemplate, TemplateSettings
from tasks.jobs.text.completions import Completions, SeamError, spans
from tasks.jobs.text.conversation import Conversation, RowError, behind_thinking, calls_in
from tasks.jobs.text.encoding import Reading, alone, encode, side_by_side
from tasks.jobs.text.templates import chatml, end_of_turn, generation_prompt, templates_of, training_template
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
        form: What is other in the turns as the template got them; empty where nothing is.
    """

    input_ids: list[int]
    mask: list[bool]
    prompt_ids: list[int]
    way: Way
    form: str = ""

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
        template: Turns into text; it holds the tokenizer.
        completions: Tokens of turns among the tokens of a text.
    """

    template: ChatTemplate
    completions: Completions

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        template: str | None = None,
        settings: TemplateSettings = NO_SETTINGS,
    ) -> Renderer:
        """The tokenizer of a model folder, with its own template or, if it has none, the one given.

        Args:
            folder: Model folder.
            template: `chatml`, the text of a Jinja template, or None.
            settings: What the template gets in every rendering.

        Raises:
            StageError: No tokenizer, no template, two templates, or turns that end with no special token.
        """
        tokenizer = _with_template(folder, template)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= {tokenizer.eos_token_id} - {None}
        chat_template = ChatTemplate.of(tokenizer, settings=settings, training=training_template(tokenizer))
        try:
            ending = end_of_turn(chat_template, folder, special=special)
            opening = generation_prompt(chat_template)
        except ValueError as error:  # RowError, or the answer is not in the text, or templates without a default one
            raise StageError.of(
                what=f"the chat template cannot render a question and its answer: {error}",
                where=str(folder),
                why="without it the completions of a row cannot be found",
                next="correct the template (model.chat_template, or chat_template.jinja of the base)",
            ) from None
        return cls(
            template=chat_template,
            completions=Completions(
                tokenizer=tokenizer, end_of_turn=ending, opening=opening, special=frozenset(special)
            ),
        )

    @property
    def tokenizer(self) -> Any:
        """A PreTrainedTokenizerBase with a chat template (its stubs do not know what a call returns)."""
        return self.template.tokenizer

    def check_settings(self) -> None:
        """Raise StageError where the template prints today's date, or does not read what the recipe gives it."""
        settings, source = self.template.settings, "\n".join(templates_of(self.tokenizer))
        wrong = misfit(source, args=settings.args, has_day=settings.day is not None)
        if wrong.no_day:
            raise StageError.of(
                what="the chat template prints today's date",
                where="model.template_date",
                why="the same rows would get other tokens tomorrow, and an answer another prompt than was trained",
                next=f"write `template_date: {date.today().isoformat()}` under `model:`; it stays what it was then",
            )
        if wrong.unread_day:
            raise StageError.of(
                what="the chat template prints no date",
                where="model.template_date",
                why="the day would change nothing",
                next="remove model.template_date",
            )
        if wrong.unread_args:
            raise StageError.of(
                what=f"the chat template reads no argument {', '.join(wrong.unread_args)}",
                where="model.template_args",
                why="it would change nothing",
                next="correct the name, or remove it",
            )

    @property
    def end_of_turn(self) -> int:
        """Id of the special token that ends an assistant turn."""
        return self.completions.end_of_turn

    def samples(self, chat: Conversation, *, max_length: int, scored: bool = False) -> list[Sample | TooLong]:
        """The samples that a row is trained on and scored by: one, or one per trained turn, each cut to fit.

        Args:
            chat: The row.
            max_length: Tokens of a sample.
            scored: An answer to the last turn is decoded and scored, so its prompt has to be what was trained.

        Raises:
            RowError: The template refuses the turns, or no way gives a sound mask; a SeamError where the prompt is no
                beginning of what is trained.
        """
        return alone(self._samples(chat, max_length=max_length, scored=scored), self.tokenizer)

    def samples_of(
        self, chats: Iterable[Conversation], *, max_length: int, scored: bool = False
    ) -> Iterator[list[Sample | TooLong] | RowError]:
        """`samples` of many rows, in their order, or why a row is refused; their texts are tokenised together."""
        return side_by_side(
            (self._samples(chat, max_length=max_length, scored=scored) for chat in chats), self.tokenizer
        )

    def render(self, chat: Conversation) -> Rendered:
        """Token ids of a conversation, every assistant turn trained but those marked `train: False`.

        Raises:
            RowError: The template refuses the turns, or no way gives a sound mask.
        """
        return alone(self._whole(chat), self.tokenizer)

    def render_last(self, chat: Conversation) -> Rendered:
        """Token ids of a conversation with only its last turn trained: the tokens after the history.

        Raises:
            RowError: The template refuses the turns, or the history is not a prefix of the whole.
        """
        return alone(self._last(chat), self.tokenizer)

    def prompt(self, chat: Conversation) -> list[int]:
        """Token ids of the history before the last turn, with the generation prompt."""
        (encoded,) = encode(self.tokenizer, [self.template.prompt(chat)])
        return encoded.ids

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
        start, stop = spans(rendered.mask)[-1]
        return behind_thinking(self.tokenizer.decode(rendered.input_ids[start:stop], skip_special_tokens=True))

    def _samples(self, chat: Conversation, *, max_length: int, scored: bool) -> Reading[list[Sample | TooLong]]:
        samples: list[Sample | TooLong] = yield from self._cut_samples(chat, max_length=max_length)
        for sample in samples:
            if scored and isinstance(sample, Sample) and sample.last and sample.rendered.skewed:
                raise SeamError(
                    f"turn {len(chat.turns)}: its answer would be decoded from a prompt that is no beginning of what "
                    "is trained"
                )
        return samples

    def _cut_samples(self, chat: Conversation, *, max_length: int) -> Reading[list[Sample | TooLong]]:
        """One sample of the whole row; where no way masks it, one per trained turn."""
        try:
            return [(yield from _fitted(chat, self._whole, max_length=max_length, turn=0, last=chat.is_answered))]
        except RowError:
            if chat.trained == [len(chat.turns)]:
                raise
        samples: list[Sample | TooLong] = []
        for number in chat.trained:
            last = number == len(chat.turns)
            shorter = chat.until(number)
            samples.append((yield from _fitted(shorter, self._last, max_length=max_length, turn=number, last=last)))
        return samples

    def _whole(self, chat: Conversation) -> Reading[Rendered]:
        shaped = self.template.shaped(chat, trained=chat.trained)
        text, form = shaped.marked, shaped.form.says
        whole, prompt = yield [text.text, self.template.prompt(shaped.chat)]
        mask = self.completions.between_markers(chat, whole, text.spans)
        way: Way = text.markers
        if mask is None:
            way, mask = "prefixes", [False] * len(whole.ids)
            for number in chat.trained:
                before, until = prompt, whole
                if number < len(chat.turns):
                    part = shaped.chat.until(number)
                    before, until = yield [self.template.prompt(part), self.template.text(part)]
                turn = self.completions.turn(number, ids=whole.ids, before=before.ids, until=until.ids)
                mask[turn.start : turn.stop] = [True] * len(turn)
        rendered = Rendered(input_ids=whole.ids, mask=mask, prompt_ids=prompt.ids, way=way, form=form)
        return self._checked(chat, rendered, trained=chat.trained)

    def _last(self, chat: Conversation) -> Reading[Rendered]:
        number = len(chat.turns)
        shaped = self.template.shaped(chat, trained=[number], markers=False)
        whole, prompt = yield [shaped.marked.text, self.template.prompt(shaped.chat)]
        turn = self.completions.turn(number, ids=whole.ids, before=prompt.ids, until=whole.ids)
        mask = [place in turn for place in range(len(whole.ids))]
        rendered = Rendered(
            input_ids=whole.ids, mask=mask, prompt_ids=prompt.ids, way=ONE_A_TURN, form=shaped.form.says
        )
        return self._checked(chat, rendered, trained=[number])

    def _checked(self, chat: Conversation, rendered: Rendered, *, trained: Sequence[int]) -> Rendered:
        """Pass it on; RowError for a doubled beginning-of-text token, or a tool call that is not trained."""
        ids, mask, bos = rendered.input_ids, rendered.mask, self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RowError("begins with two beginning-of-text tokens")
        if any(chat.turns[number - 1].get("tool_calls") for number in trained):
            text = self.tokenizer.decode([token for token, inside in zip(ids, mask, strict=True) if inside])
            for number in trained:
                for function in calls_in(chat.turns[number - 1]):
                    if function["name"] not in text:
                        raise RowError(f"turn {number}: the template leaves out its call of {function['name']}")
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
    chat: Conversation, reading: Callable[[Conversation], Reading[Rendered]], *, max_length: int, turn: int, last: bool
) -> Reading[Sample | TooLong]:
    """The longest version within `max_length` tokens that still has a trained turn, leading exchanges dropped."""
    tokens = 0
    for shorter in chat.shorter():
        if not shorter.trained:
            break
        rendered = yield from reading(shorter)
        length = len(rendered.input_ids)
        tokens = tokens or length
        if length <= max_length:
            dropped = len(chat.turns) - len(shorter.turns)
            return Sample(shorter.turns, rendered, turn, dropped, last, lost=tokens - length)
    return TooLong(tokens)
