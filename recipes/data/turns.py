"""Turns as people write them -> turns in one form: the only place that knows the field's spellings.

A turn in this form has a `role` (system, developer, user, assistant, tool) and a `content` that is text, empty where
the turn only calls tools. It may have `tool_calls` (see recipes/data/tools.py), `reasoning_content`, and
`train: false`, on an assistant turn that is context and not trained. Keys that nothing here reads stay, for the chat
template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.data.files import Unread
from recipes.data.raw.strict import parse
from recipes.data.tools import calls_of, without_padding
from recipes.plain import is_list, is_mapping

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
CALL = "call"  # a turn of its own that holds nothing but calls: it joins the assistant's turn
SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",  # OpenAI's first form
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
    "function_call": CALL,
    "tool_call": CALL,
    "tool_calls": CALL,
}
REASONING = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("weight", "train", "loss")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TEXT_PARTS = ("text", "input_text", "output_text")
READ = ("role", "from", "content", "value", "tool_calls", "function_call", *FLAGS, *REASONING, "name", "tool_call_id")


def said_bytes(turn: Message) -> int:
    """UTF-8 bytes of all that a turn says: thinking, text and calls."""
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return sum(len(text.encode()) for text in (turn.get("reasoning_content") or "", turn.get("content") or "", calls))


def turns_of(value: Any, tools: Sequence[Mapping[str, Any]] | None = None, *, drop_reasoning: bool) -> list[Message]:
    """A list of turns, or its JSON text where a cell can hold nothing else.

    Args:
        value: As it is in the row.
        tools: The row's tools: they say where a null is an argument, and not padding.
        drop_reasoning: Leave reasoning out.

    Raises:
        Unread: It is no list of turns, or a turn cannot be read; the message names the turn.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse(value)
        except Unread as error:
            raise Unread(f"has turns that are not JSON: their text {error}") from None
    if not is_list(value) or not value:
        raise Unread("has no list of turns")
    turns: list[Message] = []
    for number, raw in enumerate(value, start=1):
        turn = _turn(raw, number, tools, drop_reasoning=drop_reasoning)
        if turn["role"] == CALL:
            _join_call(turns, turn, number)
        else:
            turns.append(turn)
    return turns


def check_turns(turns: Sequence[Message]) -> None:
    """Raise Unread unless there is something to train on: no empty answer, one at the end, one trained."""
    if not turns:
        raise Unread("has no list of turns")
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise Unread(f"turn {number} is an empty assistant turn")
    if turns[-1]["role"] != "assistant":
        raise Unread("does not end with an assistant turn, so its last turn has no answer")
    if not any(is_trained(turn) for turn in turns):
        raise Unread("has no turn to train: `weight`, `train` or `loss` turns every assistant turn off")


def is_trained(turn: Mapping[str, Any]) -> bool:
    """An assistant turn that is not marked as context."""
    return turn["role"] == "assistant" and turn.get("train", True)


def _turn(raw: Any, number: int, tools: Sequence[Mapping[str, Any]] | None, *, drop_reasoning: bool) -> Message:
    if not is_mapping(raw):
        raise Unread(f"turn {number} is no object with a role and a content")
    given = {name: value for name, value in raw.items() if value is not None}
    role = _role(given, number)
    if given.get("train_detail"):  # axolotl's
        raise Unread(f"turn {number} has `train_detail`; a turn is trained as a whole or not at all")
    for name in (*MEDIA, "refusal"):
        if given.pop(name, None):
            raise Unread(f"turn {number} has `{name}`; only text is trained")
    content = _text(given.get("content", given.get("value")), number)
    calls = _calls(given, content, number, tools, role=role)
    if content is None and not calls:
        raise Unread(f"turn {number} has no text as content")
    turn: Message = {"role": role, "content": "" if content is None or role == CALL else content}
    if calls:
        turn["tool_calls"] = calls
    reasoning = _reasoning(given, number)
    if reasoning and not drop_reasoning:
        if role not in ("assistant", CALL):
            raise Unread(f"turn {number} has reasoning, and is no assistant turn")
        turn["reasoning_content"] = reasoning
    if not _is_trained(given, number, role=role):
        turn["train"] = False
    others = {name: without_padding(value) for name, value in given.items() if name not in READ}
    return turn | {name: given[name] for name in ("name", "tool_call_id") if name in given} | others


def _role(given: Mapping[str, Any], number: int) -> str:
    speaker = given.get("role", given.get("from"))
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        said = f"is from {speaker!r}" if speaker is not None else "has no role"
        raise Unread(f"turn {number} {said}; known are {', '.join(SPEAKERS)}")
    return role


def _text(content: Any, number: int) -> str | None:
    """Text of a turn; text parts are joined by line ends, as vLLM does for a template that takes text."""
    if content is None or isinstance(content, str):
        return content
    if not is_list(content):
        raise Unread(f"turn {number} has no text as content, but {_kind(content)}")
    texts: list[str] = []
    for place, part in enumerate(content, start=1):
        if is_mapping(part) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = f"`{part.get('type', '?')}`" if is_mapping(part) else _kind(part)
            raise Unread(f"turn {number} has a part of the kind {kind} (part {place}); only text is trained")
    return "\n".join(texts) if texts else None


def _kind(value: object) -> str:
    if is_mapping(value):
        return "an object"
    if is_list(value):
        return "a list"
    return "true or false" if isinstance(value, bool) else "a number"


def _calls(
    given: Mapping[str, Any], content: str | None, number: int, tools: Sequence[Mapping[str, Any]] | None, *, role: str
) -> list[dict[str, Any]]:
    """Calls of `tool_calls`, of OpenAI's first `function_call`, or of a turn that is one."""
    calls = given.get("tool_calls") or given.get("function_call")
    if role == CALL and not calls:
        calls = content
    elif calls and role not in ("assistant", CALL):
        raise Unread(f"turn {number} calls a tool, and is no assistant turn")
    return calls_of(calls, tools, what=f"turn {number}") if calls else []


def _reasoning(given: Mapping[str, Any], number: int) -> str:
    texts = {text for name in REASONING if (text := _text(given.get(name), number))}
    if len(texts) > 1:
        raise Unread(f"turn {number} has several texts in {', '.join(name for name in REASONING if given.get(name))}")
    return next(iter(texts), "")


def _is_trained(given: Mapping[str, Any], number: int, *, role: str) -> bool:
    """What `weight`, `train` and `loss` of a turn say; trained where it has none of them."""
    said = set[bool]()
    for name in FLAGS:
        if name not in given:
            continue
        if given[name] not in (0, 1):
            raise Unread(f"turn {number} has the {name} {given[name]!r}; only 0 and 1, false and true are known")
        if given[name] and name != "weight" and role not in ("assistant", CALL):
            raise Unread(f"turn {number} has `{name}: true`, and only assistant turns are trained")
        said.add(bool(given[name]))
    if len(said) > 1:
        raise Unread(f"turn {number} has {' and '.join(name for name in FLAGS if name in given)} that disagree")
    return role not in ("assistant", CALL) or True in said or not said


def _join_call(turns: list[Message], call: Message, number: int) -> None:
    """Several calls in a row, and the text before them, are one turn of the assistant."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append(call | {"role": "assistant"})
        return
    before = turns[-1]
    if is_trained(before) != call.get("train", True):
        raise Unread(f"turn {number} belongs to the turn before it, and only one of them is trained")
    if "reasoning_content" in call and "reasoning_content" in before:
        raise Unread(f"turn {number} belongs to the turn before it, and both have reasoning")
    turns[-1] = {**call, **before, "tool_calls": [*before.get("tool_calls", []), *call["tool_calls"]]}
