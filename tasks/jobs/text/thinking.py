"""Thinking in what a model says: the marks around it, what stands behind it, and whether it ever ends.

The marks are found by rendering a turn with reasoning: what the template puts before and behind it. A template without
a place for reasoning is looked at for marks that models write by themselves. `<think>` counts in any case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tasks.jobs.text.chat_template import ChatTemplate
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.encoding import encode
from tasks.jobs.text.templates import templates_of

THOUGHT, SAID = "Quench thinks", "Quench says"
MARK: Final = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class Marks(NamedTuple):
    """What stands before and behind thinking.

    Attributes:
        closing_ids: Tokens of `closing`, where decoding drops one of them as a special token; else none.
    """

    opening: str
    closing: str
    closing_ids: tuple[int, ...] = ()


USUAL: Final = Marks("<think>", "</think>")
# Of models whose templates have no `reasoning_content`: Mistral's reasoners, Cohere's, EXAONE Deep, Seed-OSS.
OTHERS: Final = (
    Marks("[THINK]", "[/THINK]"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<thought>", "</thought>"),
    Marks("<seed:think>", "</seed:think>"),
)


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How thinking is marked in the answers of a model.

    Attributes:
        tokenizer: A PreTrainedTokenizerBase.
        marks: All pairs that count.
    """

    tokenizer: Any
    marks: tuple[Marks, ...] = (USUAL,)

    @classmethod
    def of(cls, template: ChatTemplate) -> Thinking:
        """The marks of a template, and `<think>`."""
        found = _rendered(template) or _named(template)
        pairs = dict.fromkeys((found, USUAL) if found else (USUAL,))
        return cls(tokenizer=template.tokenizer, marks=tuple(_with_ids(pair, template.tokenizer) for pair in pairs))

    def behind(self, tokens: Sequence[int]) -> str:
        """The text of an answer without the thinking before it: what a scorer gets."""
        kept = list(tokens)
        for pair in self.marks:
            kept = _behind_last(kept, pair.closing_ids)
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return self.behind_text(text if len(kept) == len(tokens) else text.lstrip("\n"))

    def behind_text(self, text: str) -> str:
        """The same, of a text."""
        for pair in self.marks:
            if pair.closing in text:
                text = text.rpartition(pair.closing)[2].lstrip("\n")
        return text

    def begins(self, text: str) -> bool:
        """A text that is thinking from its first word, with nothing behind that ends it."""
        return self.behind_text(text) == text and any(text.lstrip().startswith(pair.opening) for pair in self.marks)

    def never_ends(self, tokens: Sequence[int], *, prompt: str, reference: str) -> bool:
        """An answer is thinking that was opened, by its prompt or in the answer itself, and not closed.

        Args:
            tokens: The answer.
            prompt: What it was decoded from, special tokens included.
            reference: The right answer. Where the opening mark is a part of it (a question about HTML), it opens no
                thinking in the middle of an answer.
        """
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=False)
        rest = self.behind_text(text)
        if rest == text and any(prompt.rstrip().endswith(pair.opening) for pair in self.marks):
            return True
        return self.begins(rest) or any(pair.opening in rest and pair.opening not in reference for pair in self.marks)


def _rendered(template: ChatTemplate) -> Marks | None:
    """What the template puts around the reasoning of a turn; None where it renders none."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAID, "reasoning_content": THOUGHT}]
    try:
        shaped = template.shaped(Conversation(turns=turns), trained=[2], markers=False)
        prompt = template.prompt(shaped.chat)
    except RowError:
        return None
    before, _, behind = shaped.marked.text.partition(THOUGHT)
    closing = behind.partition(SAID)[0].strip()
    if USUAL.closing in closing:  # Hunyuan writes </think> and <answer>
        return USUAL
    opening = before.removeprefix(prompt).strip() if before.startswith(prompt) else ""
    if not opening:  # the prompt opens it, or closes an empty one: then its mark is the other half of what ends it
        half = closing.replace("/", "", 1).replace("END", "START")
        opening = half if before.rstrip().endswith(half) else ""
    return Marks(opening, closing) if MARK.search(opening) and MARK.search(closing) else None


def _named(template: ChatTemplate) -> Marks | None:
    """The first of OTHERS whose end stands in the template, or among the tokens that were added to the vocabulary."""
    names = {str(token) for token in template.tokenizer.added_tokens_decoder.values()}
    source = "\n".join(templates_of(template.tokenizer))
    return next((pair for pair in OTHERS if pair.closing in source or pair.closing in names), None)


def _with_ids(pair: Marks, tokenizer: Any) -> Marks:
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    (closing,) = encode(tokenizer, [pair.closing])
    return pair._replace(closing_ids=tuple(closing.ids) if special & set(closing.ids) else ())


def _behind_last(tokens: list[int], mark: Sequence[int]) -> list[int]:
    """The tokens behind the last place of some others; all of them where these do not come, or are none."""
    size = len(mark)
    for start in range(len(tokens) - size, -1, -1) if size else ():
        if tokens[start : start + size] == list(mark):
            return tokens[start + size :]
    return tokens
