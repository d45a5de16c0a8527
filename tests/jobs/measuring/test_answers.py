"""What is no answer: thinking that never ends, however a template opens it; and what scorers get of one that ends."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tasks.jobs.measuring.answers import AnswerReader
from tasks.jobs.measuring.decoding import Decoded
from tasks.jobs.measuring.grading import Prompting
from tasks.jobs.measuring.teacher_forcing import TokenRow
from tasks.jobs.text.chat_template import NO_SETTINGS, ChatTemplate, TemplateSettings
from tasks.jobs.text.thinking import Thinking
from tasks.jobs.text.tokenizer import load_tokenizer
from tests.jobs.text.templates import QWEN3
from tests.tiny import PLAIN, write_tokenizer

OPENED = PLAIN.replace("assistant\n' -}}{%- endif", "assistant\n<think>\n' -}}{%- endif")


def reasoning(before: str, behind: str) -> str:
    """A template that renders `reasoning_content` between two texts."""
    return PLAIN.replace(
        "message['content']",
        f"('{before}' + message['reasoning_content'] + '{behind}' if message['reasoning_content'] else '')"
        " + message['content']",
    )


class Case(NamedTuple):
    """A template, which of its marks are special tokens, and the marks that have to be found."""

    template: str
    special: tuple[str, ...]
    opening: str
    closing: str


FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
CASES = {
    "no place for reasoning": Case(PLAIN, (), "<think>", "</think>"),
    "Qwen3": Case(QWEN3.template, (), "<think>", "</think>"),
    "opened by the prompt": Case(OPENED, (), "<think>", "</think>"),
    "special tokens, which decoding drops": Case(PLAIN, ("<think>", "</think>"), "<think>", "</think>"),
    "Hunyuan": Case(reasoning("<think>\\n", "\\n</think>\\n<answer>\\n"), (), "<think>", "</think>"),
    "Magistral": Case(reasoning("[THINK]", "[/THINK]"), ("[THINK]", "[/THINK]"), "[THINK]", "[/THINK]"),
    "Magistral without a place for it": Case(PLAIN, ("[THINK]", "[/THINK]"), "[THINK]", "[/THINK]"),
    "marks of its own": Case(reasoning("<r>", "</r>\\n"), (), "<r>", "</r>"),
    "gpt-oss": Case(
        reasoning("<|channel|>analysis<|message|>", FINAL),
        ("<|channel|>", "<|message|>", "<|end|>", "<|start|>"),
        "<|channel|>analysis<|message|>",
        FINAL,
    ),
}


def reader_of(folder: Path, template: str, special: tuple[str, ...] = ()) -> AnswerReader:
    """Of a real tokenizer with this template."""
    tokenizer = load_tokenizer(write_tokenizer(folder, template, special=special))
    return Prompting(tokenizer, [2]).reader()


def said(reader: AnswerReader, text: str, *, prompt: str | None = None, reference: str = "blue") -> tuple[str, str]:
    """What scorers get of an answer that the model ended, and its ending."""
    tokenizer = reader.tokenizer
    turns = [{"role": "user", "content": "a ?"}]
    prompt = prompt or tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt_ids, tokens = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (prompt, text))
    row = TokenRow(row="r", group="r", split="test", ids=[], counted=[], prompt_ids=prompt_ids, answer=reference)
    answer = reader.read(row, Decoded(tokens, ended=True))
    return answer.said, answer.ending


@pytest.mark.parametrize("name", CASES)
def test_thinking_ends_or_is_no_answer_whatever_the_marks(tmp_path: Path, name: str) -> None:
    template, special, opening, closing = CASES[name]
    reader = reader_of(tmp_path, template, special)
    marks = reader.thinking.marks[0]
    assert (marks.opening, marks.closing) == (opening, closing)
    assert bool(marks.closing_ids) == bool(special)
    begins = "" if name == "opened by the prompt" else opening
    assert said(reader, f"{begins}\nit may be red\n{closing}\n\nblue") == ("blue", "finished")
    assert said(reader, f"{begins}\nit may be red")[1] == "thinking"
    assert said(reader, f"{begins}\nred{closing}\n{opening}\nor is it blue")[1] == "thinking"  # opened again
    plain = said(reader, "blue")
    assert plain == ("blue", "thinking" if name == "opened by the prompt" else "finished")


def test_think_counts_whatever_the_template_says(tmp_path: Path) -> None:
    """A base that learned <think> elsewhere thinks with it, too."""
    reader = reader_of(tmp_path, CASES["Magistral"].template, CASES["Magistral"].special)
    assert said(reader, "<think>red</think>\nblue") == ("blue", "finished")
    assert said(reader, "<think>red")[1] == "thinking"


def test_a_mark_in_the_reference_is_text(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, PLAIN)
    assert said(reader, "it is the tag <think> here", reference="the tag <think>")[1] == "finished"
    assert said(reader, "it is the tag <think> here", reference="blue")[1] == "thinking"
    assert said(reader, "<think> is it that", reference="the tag <think>")[1] == "thinking"  # from its first word


def test_a_prompt_that_closes_its_thinking_leaves_none_open(tmp_path: Path) -> None:
    """Qwen3 with enable_thinking: false; and a question that has the mark in it."""
    reader = reader_of(tmp_path, QWEN3.template)
    closed = "<|im_start|>user\nwhat is <think> ?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert said(reader, "blue", prompt=closed) == ("blue", "finished")
    assert said(reader, "blue", prompt=closed.removesuffix("\n</think>\n\n")) == ("blue", "thinking")


def test_an_answer_without_an_end_is_cut_off_whatever_it_says(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, PLAIN)
    row = TokenRow(row="r", group="r", split="test", ids=[], counted=[], prompt_ids=[1], answer="blue")
    tokens = reader.tokenizer("<think>red</think>blue")["input_ids"]
    answer = reader.read(row, Decoded.of(tokens, [2]))
    assert (answer.said, answer.ending, answer.truncated) == ("blue", "cut", 1.0)
    answer = reader.read(row, Decoded.of([*tokens, 2, 0, 0], [2]))
    assert (answer.said, answer.ending, answer.truncated) == ("blue", "finished", 0.0)


def test_settings_of_the_recipe_reach_the_probe(tmp_path: Path) -> None:
    """A template that renders reasoning only where it is told to."""
    template = PLAIN.replace(
        "message['content']",
        "('<r>' + message['reasoning_content'] + '</r>' if thinking and message['reasoning_content'] else '')"
        " + message['content']",
    )
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template))
    told = TemplateSettings(args={"thinking": True})
    found = [Thinking.of(ChatTemplate.of(tokenizer, settings=one)).marks[0].opening for one in (NO_SETTINGS, told)]
    assert found == ["<think>", "<r>"]
