"""A row as a chat template gets it: turns, tool calls, tools; and the same row without its leading exchanges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recipes.data.turns import Message


class RowError(ValueError):
    """A row that the template cannot render into a sound mask; the message names the turn."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a chat template gets.

    Attributes:
        turns: In the row's order. A turn with tool calls has text, empty if need be (Cohere's template reads it); their
            arguments are objects, also where the row has JSON text (Qwen2.5's template would quote it twice).
        tools: JSON schemas of the row's `tools` column, None where it has none.
    """

    turns: list[Message]
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, turns: list[Message], tools: Any = None) -> Conversation:
        """Read a row's turns and its `tools`: a list of JSON schemas, or the JSON text of one.

        Raises:
            RowError: `tools` is neither, or a tool call is not an object with a name and JSON arguments.
        """
        tools = _from_json(tools, "its `tools` are") if isinstance(tools, str) and tools else tools
        if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise RowError("has `tools` that are not a list of JSON schemas")
        return cls(turns=[_with_arguments(turn, number) for number, turn in enumerate(turns, 1)], tools=tools or None)

    def until(self, number: int) -> Conversation:
        """Its first `number` turns."""
        return Conversation(turns=self.turns[:number], tools=self.tools)

    @property
    def trained(self) -> list[int]:
        """Numbers, from 1, of the assistant turns that are trained: those that are not marked `train: False`."""
        return [
            number
            for number, turn in enumerate(self.turns, start=1)
            if turn["role"] == "assistant" and turn.get("train", True)
        ]

    @property
    def is_answered(self) -> bool:
        """Its last turn is trained: there is an answer to score."""
        return self.trained[-1:] == [len(self.turns)]

    def for_template(self) -> list[Message]:
        """The turns without what is no template's business: the mark `train`, and keys with nothing in them."""
        return [
            {key: value for key, value in turn.items() if key != "train" and value is not None} for turn in self.turns
        ]

    def shorter(self) -> Iterable[Conversation]:
        """All of it, then without its first exchange, its first two ...; leading system turns go last of all.

        An exchange starts at a user turn; tool calls and their results belong to it.
        """
        turns = self.turns
        head = next(i for i, turn in enumerate(turns) if turn["role"] not in ("system", "developer"))
        starts = [i for i, turn in enumerate(turns) if turn["role"] == "user" and i > head]
        yield self
        for start in starts:
            yield Conversation(turns=turns[:head] + turns[start:], tools=self.tools)
        if head:
            yield Conversation(turns=turns[starts[-1] if starts else head :], tools=self.tools)


def calls_in(turn: Message) -> list[dict[str, Any]]:
    """Name and arguments of each function that a turn calls."""
    return [call.get("function") or call for call in turn.get("tool_calls") or []]


def behind_thinking(text: str) -> str:
    """An answer without the thinking before it: what a scorer gets of the data's answers and of a model's."""
    return text.rpartition("</think>")[2].lstrip("\n") if "</think>" in text else text


def _with_arguments(turn: Message, number: int) -> Message:
    """The turn with the arguments of its calls as objects."""
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    if not isinstance(calls, list):
        raise RowError(f"turn {number}: `tool_calls` are not a list")
    read: list[dict[str, Any]] = []
    for call in calls:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"turn {number}: a tool call is not an object with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"turn {number}: the arguments of {function['name']} are")
        function = function | {"arguments": {} if arguments is None else arguments}
        read.append(call | {"function": function} if call.get("function") else function)
    return turn | {"content": turn.get("content") or "", "tool_calls": read}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{what} no JSON ({error})") from None
