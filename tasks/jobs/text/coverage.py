"""Is everything that a row says in its rendering? What a template leaves out is refused, and the turn named.

Two looks, since each is blind for something. The row's own texts are looked for in the rendering, white space aside:
that finds what a template cuts off because of what stands there. And the same conversation with one word of its own in
place of each text is rendered, once for each shape of conversation: that finds a turn that is dropped although its
text stands elsewhere too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recipes.data.turns import Message
from tasks.jobs.text.conversation import Conversation, RowError, calls_in


@dataclass(frozen=True)
class Rendering:
    """A rendered text, without white space."""

    text: str

    @classmethod
    def of(cls, text: str) -> Rendering:
        """White space is left out: templates trim texts, and break lines between them."""
        return cls("".join(text.split()))

    def holds(self, text: str) -> bool:
        """The text is there, as it is or as a JSON string has it."""
        return any(piece in self.text for piece in _spellings(text))


def check_turns(chat: Conversation, text: str, *, trained: Sequence[int]) -> None:
    """Raise RowError where tools, a turn's text or a call are not in a rendering.

    Args:
        chat: The conversation in the form of a row.
        text: Its rendering.
        trained: Turns whose thinking before the answer, where it is a part of the content, must be there too.
    """
    rendering = Rendering.of(text)
    for number, turn in enumerate(chat.turns, start=1):
        thought, answer = _parted(turn["content"] or "")
        if not rendering.holds(answer):
            raise RowError(f"turn {number}: the template leaves out its text, or a part of it")
        if number in trained and not rendering.holds(thought):
            raise RowError(f"turn {number}: the template leaves out the thinking before its answer")
        for function in calls_in(turn):
            _check_call(function, rendering, number)
    for tool in chat.tools or []:
        function = tool.get("function") or tool
        for key in ("name", "description"):
            if not rendering.holds(str(function.get(key) or "")):
                raise RowError(f"has tools, and the template has no place for the {key} of {function.get('name')}")


def check_reasoning(chat: Conversation, text: str, *, trained: Sequence[int]) -> None:
    """Raise RowError where the reasoning of a trained turn is not in a rendering."""
    texts = {number: chat.turns[number - 1].get("reasoning_content", "") for number in trained}
    rendering = Rendering.of(text) if any(texts.values()) else None
    for number, reasoning in texts.items():
        if rendering and not rendering.holds(reasoning):
            raise RowError(
                f"turn {number}: the template has no place for its reasoning; `data.drop_reasoning: true` leaves it out"
            )


def shape_of(chat: Conversation) -> tuple[object, ...]:
    """What a template may decide by, other than what the texts say."""
    turns = [
        (
            turn["role"],
            turn.get("train", True),
            bool(turn.get("content")),
            "</think>" in (turn.get("content") or ""),
            bool(turn.get("reasoning_content")),
            *(len(function.get("arguments") or ()) for function in calls_in(turn)),
        )
        for turn in chat.turns
    ]
    return (bool(chat.tools), *turns)


def in_words(chat: Conversation) -> Conversation:
    """The conversation with a word of its own in place of each turn's text and of all that its calls pass."""
    return replace(chat, turns=[_in_words(turn, f"Quench{number}") for number, turn in enumerate(chat.turns, start=1)])


def _in_words(turn: Message, word: str) -> Message:
    thought, answer = _parted(turn["content"] or "")
    if answer.strip():
        turn = turn | {"content": (f"<think>\n{thought}\n</think>\n\n" if thought else "") + f"{word}Text"}
    if not turn.get("tool_calls"):
        return turn
    calls: list[dict[str, Any]] = []
    for place, call in enumerate(turn["tool_calls"]):
        function = call.get("function") or call
        count = len(function.get("arguments") or ())
        words = {f"{word}Key{place}x{n}": f"{word}Value{place}x{n}" for n in range(count)}
        calls.append(call | {"function": function | {"arguments": words}})
    return turn | {"tool_calls": calls}


def _parted(content: str) -> tuple[str, str]:
    """Thinking, without its tags, and the answer behind it."""
    thought, _, answer = content.rpartition("</think>")
    return thought.partition("<think>")[2] if "<think>" in thought else thought, answer


def _spellings(text: str) -> set[str]:
    """A text as it is and as a JSON string has it, with and without letters beyond ASCII; white space left out."""
    spelled = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return {"".join(piece.split()) for piece in spelled}


def _check_call(function: dict[str, Any], rendering: Rendering, number: int) -> None:
    name, arguments = function["name"], function.get("arguments")
    if not rendering.holds(name):
        raise RowError(f"turn {number}: the template leaves out its call of {name}")
    missing = next((leaf for leaf in _leaves(arguments) if not rendering.holds(leaf)), None)
    if missing is not None:
        raise RowError(f"turn {number}: the template leaves out {missing!r} in its call of {name}")
    if not arguments:
        return
    as_json = json.dumps(arguments, ensure_ascii=False)
    python, quoted = ("".join(text.split()) for text in (str(arguments), json.dumps(as_json)[1:-1]))
    plain = "".join(as_json.split())
    if plain not in rendering.text and (python in rendering.text or quoted in rendering.text):
        how = "as Python writes them" if python in rendering.text else "with quotes around them"
        raise RowError(f"turn {number}: the template writes the arguments of {name} {how}, not as JSON")


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values at every depth, as texts; true, false and null have several spellings and are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
