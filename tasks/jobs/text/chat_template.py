"""A chat template as a function of a conversation: text alone, no tokens.

The text is that of `apply_chat_template`, and so are its generation spans; the compiled template is called directly
because `apply_chat_template` renders once more for each thing that it is asked for, and tokenises each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.templates import GENERATION

Markers = Literal["generation markers", "TRL's training template"]
REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
)  # of Python in a template


class Marked(NamedTuple):
    """A rendered conversation.

    Attributes:
        spans: Characters [start, stop) between generation markers; None where no template has markers for this text.
        markers: Whose markers they are.
    """

    text: str
    spans: list[tuple[int, int]] | None
    markers: Markers


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The template, or templates, of a tokenizer.

    Attributes:
        tokenizer: A PreTrainedTokenizerBase with a chat template.
        training: TRL's training template where it has one for exactly this template.
        names: What a template may name beside the turns: special tokens.
    """

    tokenizer: Any
    training: str | None = None
    names: dict[str, Any] = field(default_factory=dict[str, Any])

    def marked(self, chat: Conversation) -> Marked:
        """The whole conversation, with the spans that its own markers or those of TRL's template give.

        Raises:
            RowError: The template refuses it; the turn is named.
        """
        own = self._source(chat)
        if GENERATION.search(own):
            text, spans = self._rendered(chat, own, tracked=True)
            return Marked(text, spans, "generation markers")
        text = self.text(chat)
        if self.training:
            try:
                again, spans = self._rendered(chat, self.training, tracked=True)
            except RowError:
                again, spans = "", []
            if again == text:
                return Marked(text, spans, "TRL's training template")
        return Marked(text, None, "TRL's training template")

    def text(self, chat: Conversation, *, prompted: bool = False) -> str:
        """A conversation; `prompted`: with the generation prompt behind it.

        Raises:
            RowError: The template refuses it; the turn is named.
        """
        return self._rendered(chat, self._source(chat), prompted=prompted)[0]

    def prompt(self, chat: Conversation) -> str:
        """The history before the last turn, with the generation prompt.

        Raises:
            RowError: The template refuses it; the turn is named.
        """
        return self.text(chat.until(len(chat.turns) - 1), prompted=True)

    def _source(self, chat: Conversation) -> str:
        return self.tokenizer.get_chat_template(tools=chat.tools)

    def _rendered(
        self, chat: Conversation, source: str, *, prompted: bool = False, tracked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text and generation spans; RowError with the turn from which on the template refuses."""
        if not chat.turns:
            raise RowError("turn 1: an assistant turn with nothing before it, which no template generates")
        try:
            return self._call(chat, source, prompted=prompted, tracked=tracked)
        except REFUSALS as error:
            number = len(chat.turns)
            while number > 1 and self._refuses(chat.until(number - 1)):
                number -= 1
            raise RowError(f"turn {number}: is refused by the chat template: {error}") from None

    def _refuses(self, chat: Conversation) -> bool:
        try:
            self._call(chat, self._source(chat), prompted=False, tracked=False)
        except REFUSALS:
            return True
        return False

    def _call(
        self, chat: Conversation, source: str, *, prompted: bool, tracked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        compiled: Any = chat_template_utils._compile_jinja_template(source)  # pyright: ignore[reportPrivateUsage]
        given = self.names | {
            "messages": chat.for_template(),
            "tools": chat.tools,
            "documents": None,
            "add_generation_prompt": prompted,
        }
        if not tracked:
            return compiled.render(**given), []
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        with compiled.environment.activate_tracker(blocks, spans):
            for block in compiled.generate(**given):
                blocks.append(block)
        return "".join(blocks), spans
