"""A chat template as a function of a conversation: text alone, no tokens.

The text is that of `apply_chat_template`, and so are its generation spans; the compiled template is called directly
because `apply_chat_template` renders once more for each thing that it is asked for, and tokenises each time.

A template comes from a stranger. transformers compiles it in Jinja's sandbox, where it reaches nothing but what it is
given; here its processor time, its memory and its text are bounded as well. So is the compiler: it folds constants.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from recipes.models.chat_template import place_of, prints_today
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.coverage import check_reasoning, check_turns, in_words, shape_of
from tasks.jobs.text.forms import Form, forms_of
from tasks.runtime.bounds import OverBounds, bounds
from tasks.runtime.process.errors import StageError
from tasks.runtime.tokenizer_files import TEMPLATE_SETTINGS

GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
Markers = Literal["generation markers", "TRL's training template"]
REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    SyntaxError,  # of the Python that Jinja makes of it: a hundred blocks in one another
)  # of Python in a template

SECONDS: Final = 10.0  # a row of 1,000 turns and 10 MB takes less than one
MIB: Final = 512  # the same row takes some 50: its text, in pieces and joined
FREE_CHARACTERS: Final = 1_000_000  # a text up to here is never too long: a template may have a system prompt
TIMES: Final = 100  # a longer one may have as many characters as this many copies of the row


class Marked(NamedTuple):
    """A rendered conversation.

    Attributes:
        spans: Characters [start, stop) between generation markers; None where no template has markers for this text.
        markers: Whose markers they are.
    """

    text: str
    spans: list[tuple[int, int]] | None
    markers: Markers


class Shaped(NamedTuple):
    """A conversation in the form that its template renders.

    Attributes:
        chat: With the turns as the template gets them; they have the numbers that they have in the row.
        form: What is other in them.
        marked: Its rendering.
    """

    chat: Conversation
    form: Form
    marked: Marked


@dataclass(frozen=True, kw_only=True)
class TemplateSettings:
    """What the recipe says to a template beside the turns.

    Attributes:
        args: Arguments of the template.
        day: What it prints as today's date.
    """

    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    day: date | None = None

    @classmethod
    def of(cls, args: Mapping[str, Any] | None, day: str | None) -> TemplateSettings:
        """As the recipe writes them."""
        return cls(args=args or {}, day=date.fromisoformat(day) if day else None)

    @classmethod
    def read(cls, folder: Path) -> TemplateSettings:
        """Those that a tokenizer's folder was written with; none where it says nothing."""
        path = folder / TEMPLATE_SETTINGS
        if not path.exists():
            return cls()
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls.of(said.get("template_args"), said.get("template_date"))

    def write(self, folder: Path) -> None:
        """Say them in a tokenizer's folder; no file where there are none, also not that of the base."""
        if self == NO_SETTINGS:
            (folder / TEMPLATE_SETTINGS).unlink(missing_ok=True)
            return
        said = {"template_args": dict(self.args), "template_date": self.day.isoformat() if self.day else None}
        text = json.dumps(said, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        (folder / TEMPLATE_SETTINGS).write_text(text, encoding="utf-8")

    def names(self, template: str) -> dict[str, Any]:
        """What the template may name.

        `date_string` is given, as templates write days, to one that has a fixed day without it (Llama 3.1).
        """
        if self.day is None:
            return dict(self.args)
        fixed = {"date_string": self.day.strftime("%d %b %Y")} if "date_string" in template else {}
        return {"strftime_now": self.day.strftime, **({} if prints_today(template) else fixed), **self.args}


NO_SETTINGS: Final = TemplateSettings()


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The template, or templates, of a tokenizer.

    Attributes:
        tokenizer: A PreTrainedTokenizerBase with a chat template.
        training: TRL's training template where it has one for exactly this template.
        settings: Arguments and the date.
        special: Special tokens by the names that a template has for them.
        whole: Shapes of conversations whose turns are all rendered; filled as rows come.
    """

    tokenizer: Any
    training: str | None = None
    settings: TemplateSettings = NO_SETTINGS
    special: Mapping[str, Any] = field(default_factory=dict[str, Any])
    whole: set[tuple[object, ...]] = field(default_factory=set[tuple[object, ...]])

    @classmethod
    def of(cls, tokenizer: Any, *, settings: TemplateSettings, training: str | None = None) -> ChatTemplate:
        """The template of a tokenizer."""
        special = dict(tokenizer.special_tokens_map)
        return cls(tokenizer=tokenizer, training=training, settings=settings, special=special)

    def shaped(self, chat: Conversation, *, trained: Sequence[int], markers: bool = True) -> Shaped:
        """The conversation in the first form whose rendering holds all that it says.

        The reasoning of earlier turns need not be there, as templates leave it out once a question follows; that of
        the turns `trained` must.

        Args:
            chat: In the form of a row.
            trained: Numbers of the turns that are trained in this rendering.
            markers: Look for generation markers.

        Raises:
            RowError: No form is rendered whole; the turn, and what is missing in the first form.
        """
        first: RowError | None = None
        reasons = [number for number in trained if chat.turns[number - 1].get("reasoning_content")]
        for form in forms_of(chat, self.source(chat)):
            shaped = form.of(chat)
            try:
                marked = self.marked(shaped) if markers else Marked(self.text(shaped), None, "generation markers")
                check_turns(chat, marked.text, trained=trained)
                self._check_shape(chat, form)
                if reasons and reasons[-1] < len(chat.turns):  # the place of reasoning is where it is the last turn's
                    until = chat.until(reasons[-1])
                    check_reasoning(until, self.text(form.of(until)), trained=reasons[-1:])
                else:
                    check_reasoning(chat, marked.text, trained=reasons[-1:])
            except RowError as error:
                first = first or error
                continue
            check_reasoning(chat, marked.text, trained=trained)
            return Shaped(shaped, form, marked)
        raise first or AssertionError("there is always a form")

    def marked(self, chat: Conversation) -> Marked:
        """The whole conversation, with the spans that its own markers or those of TRL's template give.

        Raises:
            RowError: The template refuses it; the turn is named.
        """
        own = self.source(chat)
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
        return self._rendered(chat, self.source(chat), prompted=prompted)[0]

    def prompt(self, chat: Conversation) -> str:
        """The history before the last turn, with the generation prompt.

        Raises:
            RowError: The template refuses it; the turn is named.
        """
        return self.text(chat.until(len(chat.turns) - 1), prompted=True)

    def source(self, chat: Conversation) -> str:
        """The Jinja text that renders a conversation; some tokenizers have another one for tools."""
        return self.tokenizer.get_chat_template(tools=chat.tools)

    def _check_shape(self, chat: Conversation, form: Form) -> None:
        """Raise RowError where a conversation of this shape loses a turn; each shape is rendered once."""
        shape = (form, *shape_of(chat))
        if shape in self.whole:
            return
        worded = in_words(chat)
        try:
            text = self._call(form.of(worded), self.source(chat), prompted=False, tracked=False)[0]
        except REFUSALS:  # it wants more of a text than a word
            text = None
        if text is not None:
            try:
                check_turns(worded, text, trained=())
            except RowError as error:
                raise RowError(re.sub(r"'Quench\w+'", "an argument", str(error))) from None
        self.whole.add(shape)

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
            self._call(chat, self.source(chat), prompted=False, tracked=False)
        except REFUSALS:
            return True
        return False

    def _call(
        self, chat: Conversation, source: str, *, prompted: bool, tracked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        with bounded(source, Path(self.tokenizer.name_or_path)):
            text, spans = self._unbounded(chat, source, prompted=prompted, tracked=tracked)
        if len(text) > FREE_CHARACTERS:
            said = len(json.dumps([chat.turns, chat.tools], ensure_ascii=False))
            if len(text) > TIMES * said:
                took = f"it makes {len(text):,} characters of a row that has {said:,}"
                raise _over(took, source, Path(self.tokenizer.name_or_path))
        return text, spans

    def _unbounded(
        self, chat: Conversation, source: str, *, prompted: bool, tracked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        compiled: Any = chat_template_utils._compile_jinja_template(source)  # pyright: ignore[reportPrivateUsage]
        given = {
            **self.special,
            **self.settings.names(source),
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


@contextmanager
def bounded(source: str, folder: Path) -> Iterator[None]:
    """Where a chat template is compiled and rendered.

    Args:
        source: The template.
        folder: Of its tokenizer.

    Raises:
        StageError: It takes more processor time or memory than any row needs.
    """
    try:
        with bounds(seconds=SECONDS, mib=MIB):
            yield
    except OverBounds as error:
        raise _over(f"one rendering takes {error}", source, folder) from None


def _over(took: str, source: str, folder: Path) -> StageError:
    return StageError.of(
        what="the chat template does far more than it takes to write down a row",
        where=place_of(source, folder),
        why=f"{took}; a template comes with the model, from whoever published it, and may hold an endless loop",
        next="read the template; take the model's own from its publisher, or write a shorter one",
    )
