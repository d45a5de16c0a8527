"""The forms in which templates want what a turn holds: tool calls, reasoning, a developer turn.

Templates read the same thing under different names. A row is in one form (recipes/data/turns.py); the form that its
template renders is looked for, row by row and in one order, so that a row's tokens do not depend on other rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal, NamedTuple

from recipes.data.turns import Message
from tasks.jobs.text.conversation import Conversation

Developer = Literal["developer", "system"]
Arguments = Literal["object", "text"]
Bare = Literal["empty", "absent"]
Reasoning = Literal["reasoning_content", "reasoning", "inline"]


class Form(NamedTuple):
    """How turns are written for a template; the defaults are the form of a row.

    Attributes:
        developer: Role of a developer turn.
        arguments: A tool call's arguments are an object, or JSON text.
        bare: A turn that only calls has the empty text as its content, or no content.
        reasoning: Key that holds it; or `inline`: before the answer, between <think> and </think>.
    """

    developer: Developer = "developer"
    arguments: Arguments = "object"
    bare: Bare = "empty"
    reasoning: Reasoning = "reasoning_content"

    def of(self, chat: Conversation) -> Conversation:
        """The conversation in this form; turns keep their numbers."""
        return replace(chat, turns=[self._turn(turn) for turn in chat.turns])

    @property
    def says(self) -> str:
        """What is other than in a row; empty where nothing is."""
        parts = {
            "developer turns as system turns": self.developer != "developer",
            "arguments of tool calls as JSON text": self.arguments != "object",
            "no content in turns that only call": self.bare != "empty",
            "reasoning under the name `reasoning`": self.reasoning == "reasoning",
            "reasoning between <think> and </think> before the answer": self.reasoning == "inline",
        }
        return ", ".join(text for text, is_so in parts.items() if is_so)

    def _turn(self, turn: Message) -> Message:
        turn = dict(turn)
        if turn["role"] == "developer":
            turn["role"] = self.developer
        if turn.get("tool_calls"):
            if self.arguments == "text":
                turn["tool_calls"] = [_with_text(call) for call in turn["tool_calls"]]
            if self.bare == "absent" and not turn["content"]:
                del turn["content"]
        reasoning = turn.get("reasoning_content")
        if reasoning and self.reasoning == "inline":
            del turn["reasoning_content"]
            turn["content"] = f"<think>\n{reasoning}\n</think>\n\n{turn.get('content', '')}"
        elif reasoning:
            # The same three names that transformers gives it.
            turn["thinking"] = reasoning
            if self.reasoning == "reasoning":
                turn["reasoning"] = reasoning
        return turn


def forms_of(chat: Conversation, template: str) -> Iterator[Form]:
    """The forms to try for a conversation, the row's own first; one alone where nothing in it has several.

    Args:
        chat: The conversation.
        template: The text of the template: only one that names developer turns is given them, and only one that names
            <think> is given reasoning as a part of the answer.
    """
    roles = {turn["role"] for turn in chat.turns}
    calling = [turn for turn in chat.turns if turn.get("tool_calls")]
    developer: list[Developer] = ["developer"]
    if "developer" in roles:
        developer = ["developer", "system"] if "developer" in template else ["system", "developer"]
    arguments: list[Arguments] = ["object", "text"] if calling else ["object"]
    bare: list[Bare] = ["empty", "absent"] if any(not turn["content"] for turn in calling) else ["empty"]
    reasoning: list[Reasoning] = ["reasoning_content"]
    if any(turn.get("reasoning_content") for turn in chat.turns):
        reasoning.append("reasoning")
        if "think>" in template:
            reasoning.append("inline")
    return (Form(*choice) for choice in product(developer, arguments, bare, reasoning))


def _with_text(call: dict[str, object]) -> dict[str, object]:
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    text = {**inner, "arguments": json.dumps(inner.get("arguments"), ensure_ascii=False)}
    return call | {"function": text} if inner is function else text
