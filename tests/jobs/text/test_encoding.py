"""Texts first, tokens second: the ids of `apply_chat_template`, for one row and for many side by side."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.jobs.text import encoding
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.encoding import Encoded, alone, side_by_side
from tasks.jobs.text.rendering import Sample
from tests.jobs.test_prepare import chat
from tests.jobs.text.test_rendering import CHATML, FAMILIES, PHI3, TOOLS, with_tools
from tests.tiny import MARKED

EVERY = FAMILIES | {"phi3": PHI3, "marked": CHATML._replace(template=MARKED)}


def talks(name: str) -> list[Conversation]:
    """Some that the family's template takes, of one to five answers."""
    pairs = [text for number in range(5) for text in (f"what is {number} é漢😀 ?", f" it is {number} 😀")]
    plain = [Conversation.of(chat(*pairs[: 2 * answers])) for answers in range(1, 6)]
    takes_tools = name in ("llama3", "mistral", "chatml", "qwen3")
    return plain + ([Conversation.of(with_tools(), TOOLS)] if takes_tools else [])


@pytest.mark.parametrize("name", EVERY)
def test_ids_and_prompts_are_those_of_apply_chat_template(name: str, tmp_path: Path) -> None:
    renderer = EVERY[name].renderer(tmp_path)

    def ids(turns: list[dict[str, Any]], tools: Any, **options: bool) -> list[int]:
        return renderer.tokenizer.apply_chat_template(turns, tools=tools, return_dict=False, **options)

    seen = 0
    for talk in talks(name):
        for sample in renderer.samples(talk, max_length=4096):
            assert isinstance(sample, Sample)
            assert sample.rendered.input_ids == ids(sample.turns, talk.tools)
            assert sample.rendered.prompt_ids == ids(sample.turns[:-1], talk.tools, add_generation_prompt=True)
            seen += 1
    assert seen >= 5


def test_generation_markers_give_the_mask_of_apply_chat_template(tmp_path: Path) -> None:
    renderer = EVERY["marked"].renderer(tmp_path)
    for talk in talks("marked"):
        theirs = renderer.tokenizer.apply_chat_template(talk.turns, return_dict=True, return_assistant_tokens_mask=True)
        rendered = renderer.render(talk)
        assert rendered.way == "generation markers"
        assert rendered.mask == [bool(inside) for inside in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", EVERY)
def test_many_rows_side_by_side_are_what_they_are_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SIDE_BY_SIDE", 4)
    renderer = EVERY[name].renderer(tmp_path)
    refused = Conversation.of(chat("a", "b")[1:])
    rows = [*talks(name), refused, *talks(name)]
    together = list(renderer.samples_of(rows, max_length=90))
    with pytest.raises(RowError, match="turn 1: ") as error:
        renderer.samples(refused, max_length=90)
    singly = [renderer.samples(row, max_length=90) if row is not refused else str(error.value) for row in rows]
    assert [str(made) if isinstance(made, RowError) else made for made in together] == singly
    samples = [sample for made in singly if isinstance(made, list) for sample in made]
    assert any(isinstance(sample, Sample) and sample.dropped for sample in samples)


def test_what_many_rows_ask_for_is_tokenised_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = encoding.encode

    def counting(tokenizer: Any, texts: list[str]) -> list[Encoded]:
        calls.append(len(texts))
        return real(tokenizer, texts)

    monkeypatch.setattr(encoding, "encode", counting)
    renderer = EVERY["marked"].renderer(tmp_path)
    list(renderer.samples_of([Conversation.of(chat(f"{i} ?", f"{i}")) for i in range(1500)], max_length=64))
    assert [count for count in calls if count] == [2000, 1000]  # two texts a row, and no more


def test_readings_are_taken_as_they_come(tmp_path: Path) -> None:
    renderer = CHATML.renderer(tmp_path)
    begun: list[int] = []

    def reading(number: int) -> Generator[list[str], list[Encoded], int]:
        begun.append(number)
        (first,) = yield ["a" * (number % 7 + 1)]
        second, third = yield ["b", "c"]
        return len(first.ids) + len(second.ids) + len(third.ids)

    def readings() -> Iterator[Generator[list[str], list[Encoded], int]]:
        return (reading(number) for number in range(1, 2501))

    made = side_by_side(readings(), renderer.tokenizer)
    assert next(made) == alone(reading(1), renderer.tokenizer)
    assert len(begun) == 1001  # a batch, and the one alone
    assert len(list(made)) == 2499
