"""Turns into token ids, and which of them are completion: the one place that renders a chat template.

Token ids of a row are made here once, in prepare; train, calibrate and evaluate read them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from recipes.problem import Problem
from recipes.rows import Message
from tasks.runtime.errors import StageError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "Quench"


class RowError(ValueError):
    """A row that the template cannot render into a sound mask; the message names the turn."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Token ids of a conversation; mask[i] is True where token i belongs to an assistant turn, end-of-turn included."""

    input_ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A tokenizer with a chat template whose turns end with one known token.

    Attributes:
        tokenizer: A PreTrainedTokenizerBase with a chat template (its stubs do not know what a call returns).
        end_of_turn: Id of the special token that ends an assistant turn.
        markers: The template marks completions by `{% generation %}`; else the mask comes from prefixes.
    """

    tokenizer: Any
    end_of_turn: int
    markers: bool

    @classmethod
    def open(cls, folder: Path, *, template: str | None = None) -> Renderer:
        """The tokenizer of a model folder, with its own template or, if it has none, the one given.

        Args:
            folder: Model folder.
            template: `chatml`, the text of a Jinja template, or None.

        Raises:
            StageError: No tokenizer, no template, two templates, or turns that end with no special token.
        """
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise _refusal("the base folder has no tokenizer", folder, "rows cannot be tokenised", "add its files")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if template and tokenizer.chat_template:
            raise _refusal(
                "the base has a chat template of its own and the recipe names another one",
                folder,
                "the base was trained with its own; a second one would undo that",
                "remove model.chat_template from the recipe",
            )
        if template:
            tokenizer.chat_template = chatml(tokenizer) if template == "chatml" else template
        if not tokenizer.chat_template:
            raise _refusal(
                "the base has no chat template",
                folder,
                "turns cannot be told apart without one",
                "write model.chat_template: chatml (or the path of a Jinja file) into the recipe",
            )
        marked = bool(GENERATION.search(tokenizer.chat_template)) and tokenizer.is_fast
        return cls(tokenizer=tokenizer, end_of_turn=_end_of_turn(tokenizer, folder), markers=marked)

    def render(self, messages: list[Message]) -> Rendered:
        """Token ids and completion mask of a conversation.

        Raises:
            RowError: The template refuses the turns, or the mask would not hold a turn's end.
        """
        ids, mask = self._marked(messages) if self.markers else self._by_prefixes(messages)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RowError("begins with two beginning-of-text tokens")
        turns = sum(turn["role"] == "assistant" for turn in messages)
        ends = sum(token == self.end_of_turn and inside for token, inside in zip(ids, mask, strict=True))
        if ends < turns:
            raise RowError(f"has {turns} assistant turn(s) and {ends} trained end-of-turn token(s)")
        return Rendered(input_ids=ids, mask=mask)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of the history before the last turn, with the generation prompt: what an answer is decoded from."""
        return self._ids(messages[:-1], add_generation_prompt=True)

    def marked_text(self, row: Rendered) -> str:
        """The row as text, trained tokens between ⟦ and ⟧."""
        parts, inside = [], False
        for token, trained in zip(row.input_ids, row.mask, strict=True):
            if trained != inside:
                parts.append("⟦" if trained else "⟧")
                inside = trained
            parts.append(self.tokenizer.decode([token]))
        return "".join(parts) + ("⟧" if inside else "")

    def _ids(self, messages: list[Message], **options: bool) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        except TemplateError as error:
            raise RowError(f"is refused by the chat template: {error}") from None

    def _marked(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Mask from generation markers, with an end-of-turn token right behind a span taken in."""
        try:
            both = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise RowError(f"is refused by the chat template: {error}") from None
        ids, mask = both["input_ids"], [bool(inside) for inside in both["assistant_masks"]]
        for index in range(1, len(ids)):
            if mask[index - 1] and ids[index] == self.end_of_turn != ids[index - 1]:
                mask[index] = True
        return ids, mask

    def _by_prefixes(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Mask from token differences: history with generation prompt, then with the turn, both prefixes of the row."""
        ids = self._ids(messages)
        mask = [False] * len(ids)
        for number, turn in enumerate(messages, start=1):
            if turn["role"] != "assistant":
                continue
            before = self._ids(messages[: number - 1], add_generation_prompt=True)
            until = self._ids(messages[:number])
            if ids[: len(before)] != before or ids[: len(until)] != until:
                raise RowError(
                    f"turn {number}: the template (or the tokenizer at its seam) renders the turns up to it otherwise "
                    "than within the whole row, so the completion's tokens cannot be told"
                )
            last = max((i for i in range(len(before), len(until)) if ids[i] == self.end_of_turn), default=-1)
            if last < 0:
                raise RowError(f"turn {number}: no end-of-turn token {self.end_of_turn} behind it")
            mask[len(before) : last + 1] = [True] * (last + 1 - len(before))
        return ids, mask


def chatml(tokenizer: Any) -> str:
    """ChatML with generation markers, for this tokenizer.

    A turn ends with `<|im_end|>` where the vocabulary has it, else with the end-of-text token: the embedding table is
    not resized. Begins with the beginning-of-text token where the tokenizer puts it before plain text.
    """
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    bos = tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
    return (
        (f"{{{{- '{bos}' -}}}}\n" if bos else "")
        + "{%- for message in messages -%}\n"
        + "{{- '<|im_start|>' + message['role'] + '\\n' -}}\n"
        + "{%- if message['role'] == 'assistant' -%}\n"
        + f"{{%- generation -%}}{{{{- message['content'] + '{end}' -}}}}{{%- endgeneration -%}}\n"
        + f"{{%- else -%}}\n{{{{- message['content'] + '{end}' -}}}}\n{{%- endif -%}}\n"
        + "{{- '\\n' -}}\n{%- endfor -%}\n"
        + "{%- if add_generation_prompt -%}\n{{- '<|im_start|>assistant\\n' -}}\n{%- endif -%}\n"
    )


def _end_of_turn(tokenizer: Any, folder: Path) -> int:
    """The first special token behind an assistant turn's text."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = tokenizer(text[text.rindex(PROBE) + len(PROBE) :], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in tail:
        if token in special | {tokenizer.eos_token_id}:
            return token
    raise _refusal(
        "the chat template ends an assistant turn with no special token",
        folder,
        "the model would never learn to stop",
        "give a template whose turns end with the tokenizer's end token",
    )


def _refusal(what: str, folder: Path, why: str, next: str) -> StageError:
    return StageError(Problem(what=what, where=str(folder), why=why, next=next))
