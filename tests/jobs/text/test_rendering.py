"""Rendering: trained tokens are exactly the assistant's texts and ends, by every template, and the same everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.jobs import calibrate, evaluate, prepare, reference
from tasks.jobs.measuring import teacher_forcing
from tasks.jobs.text.conversation import Conversation, RowError, behind_thinking
from tasks.jobs.text.rendering import Rendered, Renderer, Sample, TooLong
from tasks.jobs.training.trainer import rows_of
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_merge import plant_adapter
from tests.jobs.test_prepare import PARAMS, chat, table
from tests.jobs.text.templates import CHATML, GEMMA, GEMMA3, LLAMA3, MISTRAL, PHI3, PROMPT, QWEN3, Family
from tests.tiny import END, write_base

FAMILIES = {"llama3": LLAMA3, "mistral": MISTRAL, "chatml": CHATML, "gemma": GEMMA, "gemma3": GEMMA3, "qwen3": QWEN3}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {"type": "object"}}}]
CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'  # as templates write it


def thinking(*contents: str) -> list[dict[str, Any]]:
    """A chat whose assistant turns think before they answer."""
    turns = chat(*contents)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            turn["content"] = f"<think>\nthought {number}\n</think>\n\n{turn['content']}"
    return turns


def with_tools(arguments: object = None) -> list[dict[str, Any]]:
    """Two exchanges; in the first a tool is called, its result read and an answer given."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments or {"a": 1, "b": 2}}}
    turns = [{"role": "user", "content": "what is 1 + 2 ?"}, {"role": "assistant", "tool_calls": [call]}]
    return [*turns, {"role": "tool", "name": "add", "content": "3"}, *chat("", "it is 3", "sure ?", "yes")[1:]]


def spans(renderer: Renderer, sample: Rendered) -> list[str]:
    """The texts of the trained spans."""
    ids: list[list[int]] = []
    for place, token in enumerate(sample.input_ids):
        if sample.mask[place]:
            if not place or not sample.mask[place - 1]:
                ids.append([])
            ids[-1].append(token)
    return [renderer.tokenizer.decode(tokens) for tokens in ids]


def samples_of(
    renderer: Renderer, turns: list[dict[str, Any]], tools: object = None, *, max_length: int = 4096
) -> list[Sample]:
    samples = renderer.samples(Conversation.of(turns, tools), max_length=max_length)
    return [sample for sample in samples if isinstance(sample, Sample)]


def trained(renderer: Renderer, turns: list[dict[str, Any]], tools: object = None) -> list[list[str]]:
    return [spans(renderer, sample.rendered) for sample in samples_of(renderer, turns, tools)]


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_tokens_are_the_texts_and_their_ends(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    renderer = family.renderer(tmp_path)
    system = None if name in ("mistral", "gemma") else "be short"
    samples = samples_of(renderer, chat("what ?", "blue", "sure ?", "yes it is", system=system))
    texts = [text for sample in samples for text in spans(renderer, sample.rendered)]
    assert texts == [f"{family.lead}{text}{family.end}" for text in ("blue", "yes it is")]
    assert {sample.rendered.way for sample in samples} == {"one sample a turn" if name == "qwen3" else "prefixes"}
    for sample in samples:
        ids, prompt = sample.rendered.input_ids, sample.rendered.prompt_ids
        assert ids[: len(prompt)] == prompt
        assert sample.rendered.mask[len(prompt) :].index(True) == 0
        bos = renderer.tokenizer.bos_token_id
        assert [place for place, token in enumerate(ids) if token == bos] == ([] if family.bos is None else [0])
        assert system is None or system in renderer.tokenizer.decode(prompt)
    assert [sample.last for sample in samples] == [False] * (len(samples) - 1) + [True]


def test_the_padding_token_may_be_the_one_that_ends_a_turn(tmp_path: Path) -> None:
    same, other = CHATML.renderer(tmp_path / "a"), CHATML.renderer(tmp_path / "b", pad="<|endoftext|>")
    assert same.tokenizer.pad_token == END != other.tokenizer.pad_token
    assert samples_of(same, chat("a", "b", "c", "d")) == samples_of(other, chat("a", "b", "c", "d"))


def test_a_turn_ends_before_the_token_that_is_behind_all(tmp_path: Path) -> None:
    renderer = PHI3.renderer(tmp_path)
    (sample,) = samples_of(renderer, chat("what ?", "blue", "sure ?", "yes"))
    assert spans(renderer, sample.rendered) == ["blue<|end|>", "yes<|end|>"]
    assert renderer.tokenizer.decode(sample.rendered.input_ids).endswith("yes<|end|>\n<|endoftext|>")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", [[CALL + "<|eom_id|>", "it is 3<|eot_id|>", "yes<|eot_id|>"]]),
        ("chatml", [[f"<tool_call>{CALL}</tool_call><|im_end|>", "it is 3<|im_end|>", "yes<|im_end|>"]]),
        ("mistral", [[f"[TOOL_CALLS] {CALL}</s>"], [" it is 3</s>"], [" yes</s>"]]),
        (
            "qwen3",
            [
                [f"<think>\n\n</think>\n\n<tool_call>{CALL}</tool_call><|im_end|>"],
                ["<think>\n\n</think>\n\nit is 3<|im_end|>"],
                ["<think>\n\n</think>\n\nyes<|im_end|>"],
            ],
        ),
    ],
)
def test_tool_calls_are_trained_and_tools_are_in_the_prompt(name: str, expected: list[Any], tmp_path: Path) -> None:
    """Mistral's tools stand before the last question, so that earlier turns are rendered otherwise: samples."""
    renderer = FAMILIES[name].renderer(tmp_path)
    turns = with_tools()
    assert trained(renderer, turns, TOOLS) == expected
    assert trained(renderer, turns, json.dumps(TOOLS)) == expected  # parquet has no place for schemas of many shapes
    for sample in samples_of(renderer, turns, TOOLS):
        assert '"description": "a sum"' in renderer.tokenizer.decode(sample.rendered.prompt_ids)
    turns[1] = {**turns[1], "content": None, "tool_calls": [{"function": json.loads(CALL)}]}
    turns[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1, "b": 2}'  # JSON text, as OpenAI has it
    assert trained(renderer, turns, TOOLS) == expected


@pytest.mark.parametrize(
    ("turns", "tools", "says"),
    [
        (chat("a", "b"), "no json", "`tools` are no JSON"),
        (chat("a", "b"), {"name": "add"}, "not a list of JSON schemas"),
        ([*chat("a"), {"role": "assistant", "content": "", "tool_calls": ["add"]}], None, "turn 2: a tool call"),
        (
            [*chat("a"), {"role": "assistant", "content": "", "tool_calls": {"name": "add"}}],
            None,
            "turn 2: `tool_calls`",
        ),
        (with_tools("{broken")[:2], None, "turn 2: the arguments of add are no JSON"),
    ],
)
def test_malformed_tools_are_refused(turns: list[dict[str, Any]], tools: object, says: str) -> None:
    with pytest.raises(RowError, match=says):
        Conversation.of(turns, tools)


@pytest.mark.parametrize(
    ("name", "turns", "says"),
    [
        ("mistral", chat("a", "b", system="short"), "turn 1: .*only user, assistant"),
        ("gemma", chat("a", "b", "c", "d", system="short"), "turn 1: .*System role not supported"),
        ("gemma3", [*chat("a", "b"), *chat("c", "d")[1:]], "turn 3: .*must alternate"),
        ("mistral", [*chat("a", "b"), *chat("c"), *chat("c", "d")], "turn 4: .*must alternate"),
        ("chatml", chat("a", "b", "c")[1:2], "turn 1: an assistant turn with nothing before it"),
        ("gemma", with_tools()[:2], "turn 2"),
    ],
)
def test_what_a_template_refuses_is_named_by_turn(name: str, turns: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=says):
        samples_of(FAMILIES[name].renderer(tmp_path), turns)


SILENT = CHATML._replace(template=CHATML.template.replace("m.tool_calls or []", "[]"))
ENDLESS = CHATML._replace(
    template=CHATML.template.replace(
        "{{- '<|im_end|>\n' -}}{%- endif", "{{- '<|im_end|>\n' if loop.index < 4 -}}{%- endif"
    )
)
UNPROMPTED = CHATML._replace(
    template=CHATML.template.replace("assistant\n' -}}{%- endif", "assistant\n<think>\n' -}}{%- endif")
)


@pytest.mark.parametrize(
    ("family", "turns", "says"),
    [
        (SILENT, with_tools()[:2], "turn 2: the template leaves out its call of add"),
        (
            SILENT,
            [*with_tools()[:1], {**with_tools()[1], "content": "let me see"}],
            "turn 2: .* leaves out its call of add",
        ),
        (ENDLESS, chat("a", "b", "c", "d"), "turn 4: no special token ends it"),
        (UNPROMPTED, chat("a", "b", "c", "d"), "turn 2: it does not begin with"),
    ],
)
def test_what_cannot_be_masked_is_refused_by_turn(family: Family, turns: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=says):
        samples_of(family.renderer(tmp_path), turns)


def test_a_token_that_spans_the_seam_is_refused(tmp_path: Path) -> None:
    CHATML.renderer(tmp_path)
    tokenizer = Renderer.open(tmp_path).tokenizer
    tokenizer.add_tokens(["\n\n"])
    tokenizer.save_pretrained(tmp_path / "merged")
    renderer = Renderer.open(tmp_path / "merged")
    assert trained(renderer, chat("a", "b\n\nc")) == [["b\n\nc" + END]]
    with pytest.raises(RowError, match=r"turn 2: .* spans the seam"):
        samples_of(renderer, chat("a", "\nb"))


def test_markers_around_the_header_and_the_line_end_train_neither(tmp_path: Path) -> None:
    text = "{{- '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' -}}"
    around = "{%- if m.role == 'assistant' -%}{%- generation -%}" + text + "{%- endgeneration -%}{%- else -%}" + text
    template = "{%- for m in messages -%}" + around + "{%- endif -%}{%- endfor -%}" + PROMPT
    renderer = CHATML._replace(template=template).renderer(tmp_path)
    (sample,) = samples_of(renderer, chat("a", "b", "c", "\nd"))
    assert sample.rendered.way == "generation markers"
    assert spans(renderer, sample.rendered) == ["b" + END, "\nd" + END]


def test_markers_that_miss_a_turn_give_way_to_prefixes(tmp_path: Path) -> None:
    text = "{{- '<|im_start|>' + m.role + '\n' + (m.content or '') -}}"
    once = "{%- if loop.index == 2 -%}{{- '<|im_start|>assistant\n' -}}{%- generation -%}{{- m.content -}}"
    once += "{%- endgeneration -%}{%- else -%}" + text + "{%- endif -%}"
    assert text in CHATML.template
    renderer = CHATML._replace(template=CHATML.template.replace(text, once)).renderer(tmp_path)
    ways = {len(turns): samples_of(renderer, turns)[0].rendered for turns in (chat("a", "b"), chat("a", "b", "c", "d"))}
    assert {count: one.way for count, one in ways.items()} == {2: "generation markers", 4: "prefixes"}
    assert spans(renderer, ways[2]) == ["b" + END]
    assert spans(renderer, ways[4]) == ["b" + END, "d" + END]


WORDS = st.text(st.sampled_from("ab é漢😀<|>/\n\t {}"), min_size=1, max_size=12).filter(str.strip)
TALKS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Renderer]:
    return {name: family.renderer(tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_covers_each_text_exactly(name: str, renderers: dict[str, Renderer]) -> None:
    renderer, family = renderers[name], FAMILIES[name]
    as_written: Callable[[str], str] = str if name in ("chatml", "qwen3") else str.strip
    tokens = renderer.tokenizer

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(TALKS)
    def holds(pairs: list[tuple[str, str]]) -> None:
        samples = samples_of(renderer, chat(*[text for pair in pairs for text in pair]))
        texts = [text for sample in samples for text in spans(renderer, sample.rendered)]
        assert texts == [f"{family.lead}{as_written(answer)}{family.end}" for _, answer in pairs]
        for sample in samples:
            untrained = [
                id for id, inside in zip(sample.rendered.input_ids, sample.rendered.mask, strict=True) if not inside
            ]
            history = tokens.decode(untrained)
            for question, _ in pairs[: (sample.turn or len(pairs) * 2) // 2]:
                assert as_written(question) in history

    holds()


def test_truncation_drops_whole_exchanges_with_their_tools(tmp_path: Path) -> None:
    renderer = CHATML.renderer(tmp_path)
    turns = [{"role": "system", "content": "short"}, *with_tools()]
    (whole,) = samples_of(renderer, turns)
    length = len(whole.rendered.input_ids)
    (same,) = samples_of(renderer, turns, max_length=length)
    (cut,) = samples_of(renderer, turns, max_length=length - 1)
    assert same == whole
    assert (cut.turns, cut.dropped) == ([turns[0], *turns[-2:]], 4)
    (bare,) = samples_of(renderer, turns, max_length=len(cut.rendered.input_ids) - 1)
    assert (bare.turns, bare.dropped) == (turns[-2:], 5)
    assert renderer.samples(Conversation.of(turns), max_length=len(bare.rendered.input_ids) - 1) == [TooLong(length)]


def test_each_sample_is_cut_on_its_own(tmp_path: Path) -> None:
    renderer = QWEN3.renderer(tmp_path)
    turns = thinking("first ?", "one " * 9, "second ?", "two", "third ?", "three " * 30)
    lengths = [len(sample.rendered.input_ids) for sample in samples_of(renderer, turns)]
    samples = renderer.samples(Conversation.of(turns), max_length=lengths[1] - 1)
    first, second, third = samples
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert (first.turn, first.dropped, first.lost, first.turns) == (2, 0, 0, turns[:2])
    assert (second.turn, second.dropped, second.turns) == (4, 2, turns[2:4])
    assert second.lost == lengths[1] - len(second.rendered.input_ids) > 0
    assert third == TooLong(lengths[2])


def test_thinking_is_no_part_of_a_scored_answer() -> None:
    assert behind_thinking("<think>\nhm\n</think>\n\n blue\n") == " blue\n"
    assert behind_thinking("\nblue") == "\nblue"
    assert behind_thinking("<think>\nand so on") == "<think>\nand so on"  # cut off: no answer


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with a Qwen3-type template, and dataset/ of 40 conversations that think, 20 questions and a tool call."""
    folder = tmp_path_factory.mktemp("talks")
    base = write_base(folder / "base", architecture="qwen3", chat_template=QWEN3.template)
    rows: list[dict[str, Any]] = [
        {"messages": thinking(f"what is {i} ?", f"it is {i}", f"sure of {i} ?", "yes")} for i in range(40)
    ]
    rows += [{"messages": chat(f"say {i}", f"{i} it is")} for i in range(20)]
    rows += [{"messages": with_tools()[:2], "tools": TOOLS}]
    data = write_jsonl(folder / "rows.jsonl", rows)
    prepare.run(make_job("prepare", folder / "dataset", params=PARAMS, data=data, tokenizer=base))
    return folder


def test_samples_of_a_row_share_its_group_and_one_is_scored(talks: Path) -> None:
    rows = table(talks / "dataset")
    assert len({row["row"] for row in rows}) == len(rows) == 101
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    assert sorted(map(len, by_group.values())) == [1] * 21 + [2] * 40
    for of_one in by_group.values():
        assert len({row["split"] for row in of_one}) == 1
        assert sum(bool(row["prompt_ids"]) for row in of_one) == 1
        if len(of_one) == 2:
            name = of_one[0]["row"].partition(".")[0]
            assert {(row["row"], row["turn"], row["answer"]) for row in of_one} == {
                (f"{name}.2", 2, ""),
                (f"{name}.4", 4, "yes"),
            }
    (call,) = [row for row in rows if "tool_calls" in row["messages"]]
    assert call["answer"] == f"<tool_call>{CALL}</tool_call>"
    summary = json.loads((talks / "dataset" / "summary.json").read_text())
    assert summary["mask_from"] == {"one sample a turn": 40, "prefixes": 21}


def test_the_job_says_how_it_masked_and_what_samples_cost(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=QWEN3.template)
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": thinking(f"{i} ?", "a", "b ?", "c", "d ?", f"{i}")} for i in range(60)]
    )
    job = make_job("prepare", tmp_path / "out", params=PARAMS, data=data, tokenizer=base)
    prepare.run(job)
    assert notes(job)["mask"].startswith("completion tokens come from one sample a turn (60 rows)")
    lengths = [len(row["input_ids"]) for row in table(job.out)]
    assert f"180 samples of {sum(lengths)} tokens" in notes(job)["samples"]
    assert "⟦<think>" in notes(job)["example"]


def test_ids_are_equal_in_train_calibrate_and_evaluate(talks: Path, tmp_path: Path) -> None:
    dataset = talks / "dataset"
    rows = {row["row"]: row for row in table(dataset) if row["split"] == "train"}
    params = {"rows": len(rows), "seq_len": 256, "stratify": "proportional", "seed": 0, "min_tokens": 0}
    params["max_near_duplicates"] = 1.0
    calibrate.run(make_job("calibrate", tmp_path / "calibset", params=params, dataset=dataset))
    sequences = pq.read_table(tmp_path / "calibset" / "calibset.parquet").to_pylist()
    assert sorted(name for sequence in sequences for name in sequence["rows"]) == sorted(rows)
    for one in sequences:
        assert one["input_ids"] == [token for name in one["rows"] for token in rows[name]["input_ids"]]
    scored = teacher_forcing.read_rows(dataset, "train")
    assert {row.row: row.ids for row in scored} == {name: row["input_ids"] for name, row in rows.items()}
    trained = rows_of(dataset, "train")
    assert [one["input_ids"] for one in trained] == [row.ids for row in scored]
    counted = [[label != -100 for label in one["labels"]] for one in trained]
    assert counted == [row.counted for row in scored]
    renderer = Renderer.open(talks / "base")
    for row in rows.values():  # and they are what the turns render to
        talk = Conversation.of(json.loads(row["messages"]), json.loads(row["columns"]).get("tools"))
        assert row["turn"] == 0 or renderer.render_last(talk).input_ids == row["input_ids"]
        assert row["turn"] or renderer.render(talk).input_ids == row["input_ids"]


def test_a_conversation_of_several_samples_is_answered_once(talks: Path, tmp_path: Path) -> None:
    world = shutil.copytree(talks, tmp_path / "world")
    plant_adapter(world / "base", world / "adapter")
    inputs = {name: world / name for name in ("dataset", "base", "adapter")}
    params = {"batch_size": 16, "reference_gib": 4.0, "seed": 0}
    reference.run(make_job("reference", world / "reference", params=params, **inputs))
    params = {
        "kind": "bf16",
        "scorers": [{"kind": "exact-match", "name": "exact-match"}],
        "max_new_tokens": 4,
        "batch_size": 16,
        "seed": 0,
    }
    inputs = {"dataset": world / "dataset", "reference": world / "reference", "model": world / "base"}
    evaluate.run(make_job("evaluate", tmp_path / "scores", params=params, **inputs))
    scores = pq.read_table(tmp_path / "scores" / "scores.parquet").to_pylist()
    held = [row for row in table(world / "dataset") if row["split"] != "train"]
    assert sorted(line["row"] for line in scores if line["metric"] == "nll") == sorted(row["row"] for row in held)
    answered = [line["group"] for line in scores if line["metric"] == "task"]
    assert sorted(answered) == sorted({row["group"] for row in held})
    assert len(answered) < len(held)


def test_a_row_that_no_way_can_mask_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=UNPROMPTED.template)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat("a", "b", "c", "d")}])
    with pytest.raises(StageError, match=r"rows\.jsonl:1 turn 2: it does not begin"):
        prepare.run(make_job("prepare", tmp_path / "out", params=PARAMS, data=data, tokenizer=base))
