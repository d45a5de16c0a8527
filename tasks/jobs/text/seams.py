"""Is an answer decoded from the beginning that was trained? And if it is not, what makes the two equal?

A template of a thinking model may end its generation prompt with an opened <think>, and render the same turn without
it in training. The prompt is a prefix then of nothing that was trained, and the figures would be of a model that is
asked in another way than it was taught.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from recipes.data.turns import Message
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.rendering import Renderer
from tasks.jobs.text.templates import generation_prompt

TRIED: Final[tuple[dict[str, bool], ...]] = tuple(
    {name: value} for name in ("enable_thinking", "thinking") for value in (False, True)
)
AROUND: Final = 40  # characters that are shown on each side of the first difference


def remedy(renderer: Renderer, turns: list[Message], tools: Any) -> str:
    """What to do about a row with a SeamError: the argument that makes both equal, else what differs."""
    chat = Conversation.of(turns, tools)
    for args in TRIED:
        name = next(iter(args))
        if name in renderer.template.source(chat) and _are_equal(_with(renderer, args), chat):
            return f"write `template_args: {_yaml(args)}` under `model:`; prompt and training are equal then"
    return (
        f"no value of {', '.join(sorted({name for args in TRIED for name in args}))} makes them equal: "
        f"{_difference(renderer, chat)}; correct the template, or give an argument of its own in model.template_args"
    )


def _with(renderer: Renderer, args: Mapping[str, Any]) -> Renderer:
    settings = replace(renderer.template.settings, args={**renderer.template.settings.args, **args})
    template = replace(renderer.template, settings=settings, whole=set())
    return replace(
        renderer, template=template, completions=replace(renderer.completions, opening=generation_prompt(template))
    )


def _are_equal(renderer: Renderer, chat: Conversation) -> bool:
    try:
        renderer.samples(chat, max_length=2**31, scored=True)
    except RowError:
        return False
    return True


def _difference(renderer: Renderer, chat: Conversation) -> str:
    """Both texts around the place where they part, for the first turn that is refused."""
    for number in chat.trained:
        part = chat.until(number)
        whole, prompt = renderer.template.text(part), renderer.template.prompt(part)
        if not whole.startswith(prompt):
            start = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(whole))
            ends = [repr(text[max(0, start - AROUND) : start + AROUND]) for text in (prompt, whole)]
            return f"the prompt has {ends[0]} where {ends[1]} is trained"
    return "their texts are, and a token spans the place where the answer begins"


def _yaml(args: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in args.items()) + "}"
