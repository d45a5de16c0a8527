"""What a template does not render is refused by turn; the form that it wants of a call or of reasoning is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.rendering import Renderer, Sample
from tests.jobs.test_prepare import chat
from tests.jobs.text.templates import CHATML, GEMMA3, LLAMA3, PROMPT, QWEN3
from tests.jobs.text.test_rendering import CALL, TOOLS, samples_of, spans, with_tools
from tests.tiny import END, MARKED

SYSTEM = {"role": "system", "content": "be short"}
DEVELOPER = {"role": "developer", "content": "be short"}


def made_of(template: str, folder: Path) -> Renderer:
    """ChatML's tokens with another template."""
    return CHATML._replace(template=template).renderer(folder)


def turns_as(body: str, *, head: str = "") -> str:
    """A template that renders each turn `m` as ChatML with this body."""
    turn = "{{- '<|im_start|>' + m.role + '\n' -}}" + body + "{{- '<|im_end|>\n' -}}"
    return head + "{%- for m in messages -%}" + turn + "{%- endfor -%}" + PROMPT


def rendered_by(body: str, turns: list[dict[str, Any]], folder: Path) -> tuple[list[str], Sample]:
    """The trained parts of a row in a template with this body, and its one sample."""
    renderer = made_of(turns_as(body), folder)
    (sample,) = samples_of(renderer, turns)
    return spans(renderer, sample.rendered), sample


def untrained(turns: list[dict[str, Any]], *numbers: int) -> list[dict[str, Any]]:
    return [turn | {"train": False} if number in numbers else turn for number, turn in enumerate(turns, start=1)]


@pytest.mark.parametrize("template", [CHATML.template, MARKED])
def test_turns_that_are_not_trained_are_context(template: str, tmp_path: Path) -> None:
    renderer = made_of(template, tmp_path)
    turns = chat("a ?", "b", "c ?", "d", "e ?", "f")
    (all_of_it,) = samples_of(renderer, turns)
    (first,) = samples_of(renderer, untrained(turns, 2))
    (last,) = samples_of(renderer, untrained(turns, 6))
    assert first.rendered.input_ids == last.rendered.input_ids == all_of_it.rendered.input_ids
    assert spans(renderer, all_of_it.rendered) == ["b" + END, "d" + END, "f" + END]
    assert spans(renderer, first.rendered) == ["d" + END, "f" + END]
    assert spans(renderer, last.rendered) == ["b" + END, "d" + END]
    assert [all_of_it.last, first.last, last.last] == [True, True, False]


def test_only_trained_turns_become_samples_of_their_own(tmp_path: Path) -> None:
    renderer = QWEN3.renderer(tmp_path)
    samples = samples_of(renderer, untrained(chat("a ?", "b", "c ?", "d", "e ?", "f"), 2, 6))
    assert [(sample.turn, sample.last) for sample in samples] == [(4, False)]
    assert spans(renderer, samples[0].rendered) == [f"<think>\n\n</think>\n\nd{END}"]


def test_a_template_never_sees_the_mark(tmp_path: Path) -> None:
    renderer = made_of(turns_as("{{- m.content + ('' if m.train is not defined else 'SEEN') -}}"), tmp_path)
    (sample,) = samples_of(renderer, untrained(chat("a ?", "b", "c ?", "d"), 2))
    assert "SEEN" not in renderer.tokenizer.decode(sample.rendered.input_ids)


def test_a_row_too_long_for_its_trained_turn_is_too_long(tmp_path: Path) -> None:
    renderer = CHATML.renderer(tmp_path)
    turns = untrained(chat("a ?", "b", "c ?", "d"), 4)
    (whole,) = samples_of(renderer, turns)
    assert not isinstance(
        renderer.samples(Conversation.of(turns), max_length=len(whole.rendered.input_ids) - 1)[0], Sample
    )


DROPS = {
    "a system turn": (
        turns_as("{{- m.content if m.role != 'system' -}}"),
        [SYSTEM, *chat("a ?", "b")],
        None,
        "turn 1: the template leaves out its text",
    ),
    "an earlier answer of the same words": (
        turns_as("{{- m.content if loop.index != 2 or loop.last -}}"),
        chat("a ?", "yes", "b ?", "yes"),
        None,
        "turn 2: the template leaves out its text",
    ),
    "all but the last exchange": (
        turns_as("{{- m.content if loop.revindex < 3 -}}"),
        chat("what ?", "blue", "sure ?", "yes"),
        None,
        "turn 1: the template leaves out its text",
    ),
    "the end of a long text": (
        turns_as("{{- m.content[:40] -}}"),
        chat("what ?" * 9, "blue"),
        None,
        "turn 1: the template leaves out its text, or a part of it",
    ),
    "tools": (turns_as("{{- m.content -}}"), chat("a ?", "b"), TOOLS, "no place for the name of add"),
    "what a tool is for": (
        turns_as("{{- m.content -}}", head="{%- for t in tools or [] -%}{{- t.function.name -}}{%- endfor -%}"),
        chat("a ?", "b"),
        TOOLS,
        "no place for the description of add",
    ),
    "a tool's answer": (
        CHATML.template.replace("\\n' + m.content + '\\n</tool_response>", "\\n</tool_response>").replace(
            "\n' + m.content + '\n</tool_response>", "\n</tool_response>"
        ),
        [*with_tools()[:2], {"role": "tool", "content": "three of them"}, *chat("", "it is so")[1:]],
        None,
        "turn 3: the template leaves out its text",
    ),
    "an argument that stands elsewhere": (
        turns_as("{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- c.function.name -}}{%- endfor -%}"),
        with_tools({"a": 1})[:2],
        None,
        "turn 2: the template leaves out an argument in its call of add",
    ),
    "text beside a call": (
        turns_as(
            "{%- if m.tool_calls -%}{{- m.tool_calls[0].function | tojson -}}{%- else -%}{{- m.content -}}{%- endif -%}"
        ),
        [*chat("a ?"), {**with_tools()[1], "content": "let me see"}],
        None,
        "turn 2: the template leaves out its text",
    ),
    "an argument": (
        turns_as("{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- c.function.name + 'a' -}}{%- endfor -%}"),
        with_tools({"a": 977})[:2],
        None,
        "turn 2: the template leaves out '977' in its call of add",
    ),
    "thinking before a trained answer": (
        turns_as("{{- m.content.split('</think>')[-1] -}}"),
        [*chat("a ?"), {"role": "assistant", "content": "<think>\nhm, so\n</think>\n\nb"}],
        None,
        "turn 2: the template leaves out the thinking before its answer",
    ),
}


@pytest.mark.parametrize("case", DROPS)
def test_what_a_template_drops_is_refused(case: str, tmp_path: Path) -> None:
    template, turns, tools, says = DROPS[case]
    with pytest.raises(RowError, match=says):
        samples_of(made_of(template, tmp_path), turns, tools)


def test_trimmed_and_quoted_texts_are_rendered(tmp_path: Path) -> None:
    body = "{%- if m.role == 'tool' -%}{{- m.content | tojson -}}{%- else -%}{{- m.content | trim -}}{%- endif -%}"
    body += "{%- for c in m.tool_calls or [] -%}{{- c.function | tojson -}}{%- endfor -%}"
    answer = {"role": "tool", "content": '{"sum": 3,\n "é": "\\"漢\\""}'}
    turns = [*with_tools()[:2], answer, *chat("", "  it is 3\n\nor so ")[1:]]
    trained, _ = rendered_by(body, turns, tmp_path)
    assert trained[1:] == ["it is 3\n\nor so" + END]


CALLS = {
    "an object": ("{{- c.function.arguments | tojson -}}", ""),
    "JSON text": ("{{- c.function.arguments -}}", "arguments of tool calls as JSON text"),
    "text, and refuses others": (
        "{%- if c.function.arguments is not string -%}{{- raise_exception('text!') -}}{%- endif -%}"
        "{{- c.function.arguments -}}",
        "arguments of tool calls as JSON text",
    ),
}


@pytest.mark.parametrize("form", CALLS)
def test_the_form_of_arguments_that_renders_is_found(form: str, tmp_path: Path) -> None:
    written, says = CALLS[form]
    body = (
        "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- c.function.name + ' ' -}}" + written + "{%- endfor -%}"
    )
    trained, sample = rendered_by(body, with_tools(), tmp_path)
    assert trained[0] == 'add {"a": 1, "b": 2}' + END
    assert sample.rendered.form == says
    assert sample.turns == Conversation.of(with_tools()).turns  # the row's own form


def test_a_call_without_content_where_the_template_wants_none(tmp_path: Path) -> None:
    body = (
        "{%- if m.content is defined -%}{{- m.content -}}{%- else -%}"
        "{%- for c in m.tool_calls -%}{{- c.function | tojson -}}{%- endfor -%}{%- endif -%}"
    )
    trained, sample = rendered_by(body, with_tools(), tmp_path)
    assert trained[0] == CALL + END
    assert sample.rendered.form == "no content in turns that only call"


def test_arguments_that_no_form_renders_are_refused(tmp_path: Path) -> None:
    body = "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- c.function.name -}}{%- endfor -%}"
    with pytest.raises(RowError, match="turn 2: the template leaves out 'axis' in its call of sum_of"):
        turns = with_tools()
        turns[1]["tool_calls"][0]["function"] = {"name": "sum_of", "arguments": {"axis": 1}}
        samples_of(made_of(turns_as(body), tmp_path), turns)


def reasoned(*contents: str) -> list[dict[str, Any]]:
    """A chat whose answers have reasoning of their own."""
    return [
        turn | {"reasoning_content": f"so it is {number}"} if turn["role"] == "assistant" else turn
        for number, turn in enumerate(chat(*contents), start=1)
    ]


REASONING = {
    "reasoning_content": ("{{- '<r>' + m.reasoning_content + '</r>' if m.reasoning_content -}}{{- m.content -}}", ""),
    "thinking": ("{{- '<r>' + m.thinking + '</r>' if m.thinking -}}{{- m.content -}}", ""),
    "reasoning": (
        "{{- '<r>' + m.reasoning + '</r>' if m.reasoning -}}{{- m.content -}}",
        "reasoning under the name `reasoning`",
    ),
    "inline": (
        "{%- set parts = m.content.split('</think>') -%}{{- '<r>' + parts[0].split('<think>')[-1].strip('\n') + '</r>'"
        " if parts | length > 1 -}}{{- parts[-1].lstrip('\n') -}}",
        "reasoning between <think> and </think> before the answer",
    ),
}


@pytest.mark.parametrize("key", REASONING)
def test_the_name_of_reasoning_that_renders_is_found(key: str, tmp_path: Path) -> None:
    body, says = REASONING[key]
    trained, sample = rendered_by(body, reasoned("a ?", "b", "c ?", "d"), tmp_path)
    assert trained == [f"<r>so it is 2</r>b{END}", f"<r>so it is 4</r>d{END}"]
    assert sample.rendered.form == says
    assert sample.turns == reasoned("a ?", "b", "c ?", "d")


def test_reasoning_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"turn 2: .*no place for its reasoning; `data.drop_reasoning: true` leaves"):
        samples_of(CHATML.renderer(tmp_path), reasoned("a ?", "b", "c ?", "d"))


def test_reasoning_of_earlier_turns_may_go_and_trained_reasoning_may_not(tmp_path: Path) -> None:
    """Qwen3's way: each turn is a sample in which its own reasoning stands."""
    body = (
        "{{- '<r>' + m.reasoning_content + '</r>' if m.reasoning_content and loop.index0 > last.question -}}"
        "{{- m.content -}}"
    )
    head = (
        "{%- set last = namespace(question=-1) -%}{%- for m in messages if m.role == 'user' -%}{%- endfor -%}"
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}"
    )
    renderer = made_of(turns_as(body, head=head), tmp_path)
    samples = samples_of(renderer, reasoned("a ?", "b", "c ?", "d"))
    assert [spans(renderer, sample.rendered) for sample in samples] == [
        [f"<r>so it is 2</r>b{END}"],
        [f"<r>so it is 4</r>d{END}"],
    ]
    assert {sample.rendered.form for sample in samples} == {""}
    (last,) = samples_of(renderer, untrained(reasoned("a ?", "b", "c ?", "d"), 2))
    assert (last.turn, spans(renderer, last.rendered)) == (0, [f"<r>so it is 4</r>d{END}"])


def test_a_developer_turn_is_the_system_turn_where_the_template_knows_no_developer(tmp_path: Path) -> None:
    turns = [DEVELOPER, *chat("what ?", "blue")]
    for family, name in ((LLAMA3, "llama3"), (CHATML, "chatml"), (GEMMA3, "gemma3")):
        renderer = family.renderer(tmp_path / name)
        (sample,) = samples_of(renderer, turns)
        (system,) = samples_of(renderer, [SYSTEM, *turns[1:]])
        assert sample.rendered.input_ids == system.rendered.input_ids
        assert sample.rendered.form == "developer turns as system turns"
        assert sample.turns == turns
    knows = turns_as("{{- 'DEV: ' if m.role == 'developer' -}}{{- m.content -}}")
    renderer = made_of(knows, tmp_path / "knows")
    (sample,) = samples_of(renderer, turns)
    assert renderer.tokenizer.decode(sample.rendered.input_ids).startswith("<|im_start|>developer\nDEV: be short")
    assert sample.rendered.form == ""


def test_two_heads_that_a_template_cannot_hold_are_refused(tmp_path: Path) -> None:
    turns = [SYSTEM, {**DEVELOPER, "content": "be kind"}, *chat("what ?", "blue")]
    with pytest.raises(RowError, match=r"turn 2: "):
        samples_of(GEMMA3.renderer(tmp_path), turns)
