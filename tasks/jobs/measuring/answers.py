"""Decoded tokens as an answer: its text, what scorers get of it, and whether it is one at all.

An answer that was cut off, and thinking that never ends, are no answers: no scorer sees them, and they score 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from tasks.jobs.measuring.decoding import Decoded
from tasks.jobs.measuring.teacher_forcing import TokenRow
from tasks.jobs.text.thinking import Thinking

Ending = Literal["finished", "cut", "thinking"]
NO_ANSWER: Final[dict[Ending, str]] = {
    "cut": "cut off: no end within the tokens that are decoded",
    "thinking": "thinking that never ends",
}


class Answer(NamedTuple):
    """What a model said to a row.

    Attributes:
        text: All of it, without special tokens.
        said: Behind its thinking: what a scorer gets.
        ending: `cut`: no token that ends it came. `thinking`: one came, and thinking was still open.
    """

    text: str
    said: str
    ending: Ending

    @property
    def truncated(self) -> float:
        """1 where it has no end, 0 where it is finished: its line of the metric `truncated`."""
        return float(self.ending != "finished")


@dataclass(frozen=True, kw_only=True)
class AnswerReader:
    """Reads what one tokenizer decodes."""

    tokenizer: Any
    thinking: Thinking

    def read(self, row: TokenRow, decoded: Decoded) -> Answer:
        """The answer to a row whose prompt is in this tokenizer's tokens."""
        text: str = self.tokenizer.decode(decoded.tokens, skip_special_tokens=True)
        said = self.thinking.behind(decoded.tokens)
        if not decoded.ended:
            return Answer(text, said, "cut")
        prompt: str = self.tokenizer.decode(row.prompt_ids)
        never_ends = self.thinking.never_ends(decoded.tokens, prompt=prompt, reference=row.answer)
        return Answer(text, said, "thinking" if never_ends else "finished")
