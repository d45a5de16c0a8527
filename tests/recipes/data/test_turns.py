"""Turns, tools and columns as people write them: what each becomes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.data.formats import columns_line, propose
from recipes.data.rows import Row, Rows, read_rows
from tests.recipes.folders import write_rows

ASK = {"role": "user", "content": "Rain in Oslo?"}
SAY = {"role": "assistant", "content": "Yes."}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
BOTH, SAID = [ASK, SAY], [ASK["content"], SAY["content"]]
HUMAN = {"from": "human", "value": "a"}
HEARD = {"role": "tool", "content": '{"mm": 4}'}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "rain", "description": "mm of rain", "parameters": SCHEMA}}


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> Rows:
    return read_rows(write_rows(folder / "rows.jsonl", list(rows)), **options)


def read_one(folder: Path, row: dict[str, Any], **options: Any) -> Row:
    rows = read(folder, row, **options)
    assert not rows.problems, rows.problems[0]
    return rows.rows[0]


def wrong(folder: Path, row: dict[str, Any], **options: Any) -> str:
    rows = read(folder, row, **options)
    assert rows.wrong, rows.rows
    return rows.wrong[0]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": '{"city": "Oslo"}'}},
        {"from": "function_call", "value": '{"name": "rain", "arguments": {"city": "Oslo"}}'},
        {
            "role": "tool_call",
            "content": '{"name": "rain", "arguments": {"city": "Oslo", "day": null}}'.replace(', "day": null', ""),
        },
        {"role": "Model", "tool_calls": [CALL], "refusal": None, "audio": None, "weight": 1},
    ],
)
def test_every_spelling_of_a_call_is_one(tmp_path: Path, turn: dict[str, Any]):
    row = read_one(tmp_path, {"messages": [ASK, turn, HEARD, SAY]})
    assert row.messages == [ASK, CALLS, HEARD, SAY]


@pytest.mark.parametrize("role", ["tool", "observation", "function", "function_response", "tool_response", "ipython"])
def test_every_name_of_a_tools_answer(tmp_path: Path, role: str):
    turns = [{"from": "human", "value": ASK["content"]}, CALLS, {"from": role, "value": HEARD["content"]}, SAY]
    assert read_one(tmp_path, {"conversations": turns}).messages == [ASK, CALLS, HEARD, SAY]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{"name": "rain", "description": "mm of rain", "input_schema": SCHEMA}],
    ],
)
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_every_spelling_of_tools_is_one(tmp_path: Path, name: str, tools: Any):
    row = read_one(tmp_path, {name: [ASK, SAY], "tools": tools})
    assert row.tools == [TOOL] and row.columns == {}
    assert read_one(tmp_path, {name: [ASK, SAY], "functions": tools, "tools": None}).tools == [TOOL]


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_no_tools_and_no_calls_are_one_thing(tmp_path: Path, nothing: Any):
    row = read_one(tmp_path, {"messages": [ASK, SAY | {"tool_calls": nothing or None}], "tools": nothing})
    assert (row.tools, row.messages) == (None, [ASK, SAY])
    assert read_one(tmp_path, {"messages": [ASK, SAY | {"tool_calls": []}]}).name == row.name


def test_padding_goes_and_a_null_that_a_schema_means_stays(tmp_path: Path):
    nullable = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": None, "default": None}, "days": nullable, "other": None},
        "required": ["city"],
    }
    arguments = {"city": "Oslo", "days": None, "other": None, "more": {"a": 1, "b": None}}
    call = {"type": "function", "id": None, "function": {"name": "rain", "arguments": arguments}}
    tool = {"type": "function", "function": {"name": "rain", "description": None, "parameters": schema}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    row = read_one(tmp_path, {"messages": [ASK | {"tool_calls": None}, turn, SAY], "tools": [tool]})
    (read_tool,) = row.tools or []
    assert read_tool["function"] == {
        "name": "rain",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": nullable},
            "required": ["city"],
        },
    }
    (read_call,) = row.messages[1]["tool_calls"]
    assert read_call["function"]["arguments"] == {"city": "Oslo", "days": None, "more": {"a": 1}}
    exact = turn | {"tool_calls": [{"function": {"name": "rain", "arguments": json.dumps({"x": None})}}]}
    assert read_one(tmp_path, {"messages": [ASK, exact]}).messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "x": None  # Arrow does not reach into text
    }


def test_a_default_of_null_stays_where_nothing_is_padded(tmp_path: Path):
    schema = {"type": "object", "properties": {"unit": {"type": "string", "default": None}}}
    tool = {"name": "rain", "parameters": schema}
    row = read_one(tmp_path, {"messages": [ASK, SAY], "tools": [tool]})
    assert row.tools == [{"type": "function", "function": tool}]


def test_calls_in_a_row_are_one_turn(tmp_path: Path):
    call = {"role": "tool_call", "content": json.dumps(CALL["function"])}
    row = read_one(
        tmp_path, {"messages": [ASK, {"role": "assistant", "content": "Let me look."}, call, call, HEARD, SAY]}
    )
    assert row.messages[1] == {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]}
    assert len(row.messages) == 4


def test_text_parts_are_joined_and_others_refused(tmp_path: Path):
    parts = [{"type": "text", "text": "Rain"}, "in", {"type": "input_text", "text": "Oslo?"}]
    assert (
        read_one(tmp_path, {"messages": [{"role": "user", "content": parts}, SAY]}).messages[0]["content"]
        == "Rain\nin\nOslo?"
    )
    parts.append({"type": "image_url", "image_url": {"url": "x.png"}})
    says = wrong(tmp_path, {"messages": [{"role": "user", "content": parts}, SAY]})
    assert says.startswith("rows.jsonl:1 turn 1 has a part of the kind `image_url` (part 4)")
    assert "has `images`" in wrong(tmp_path, {"messages": [ASK, SAY], "images": ["x.png"]})
    assert read_one(tmp_path, {"messages": [ASK, SAY], "images": []}).messages == [ASK, SAY]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0, "train": False}])
def test_a_turn_that_is_marked_is_context(tmp_path: Path, flag: dict[str, Any]):
    row = read_one(tmp_path, {"messages": [ASK | {"weight": 0}, SAY | flag, ASK, SAY | {"weight": 1, "loss": None}]})
    assert row.messages == [ASK, SAY | {"train": False}, ASK, SAY]
    assert "has no turn to train" in wrong(tmp_path, {"messages": [ASK, SAY | flag]})


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (SAY | {"weight": 0.5}, "turn 2 has the weight 0.5"),
        (SAY | {"train": "yes"}, "turn 2 has the train 'yes'"),
        (SAY | {"weight": 1, "train": False}, "turn 2 has weight and train that disagree"),
        (SAY | {"content": {"a": 1}}, "turn 2 has no text as content, but an object"),
        (SAY | {"content": None, "refusal": "I cannot."}, "turn 2 has `refusal`"),
        (SAY | {"tool_calls": [{"arguments": {}}]}, "turn 2: a tool call is no object with a name"),
        (SAY | {"tool_calls": [{"name": "rain", "arguments": "{"}]}, "turn 2: the arguments of rain: is not JSON"),
        (SAY | {"tool_calls": [{"name": "rain", "arguments": [1]}]}, "turn 2: the arguments of rain are no object"),
        (SAY | {"reasoning": "a", "thinking": "b"}, "turn 2 has several texts in reasoning, thinking"),
        ({"role": "user", "content": "x", "train": True}, "turn 2 has `train: true`, and only assistant"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "turn 2 calls a tool, and is no assistant turn"),
        ("hello", "turn 2 is no object"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, turn: Any, says: str):
    assert says in wrong(tmp_path, {"messages": [ASK, turn, SAY]})


def test_reasoning_has_one_name_and_can_be_dropped(tmp_path: Path):
    for name in ("reasoning_content", "reasoning", "thinking"):
        row = {"messages": [ASK, SAY | {name: "It is autumn."}]}
        assert read_one(tmp_path, row).messages[1] == SAY | {"reasoning_content": "It is autumn."}
        assert read_one(tmp_path, row, drop_reasoning=True).messages[1] == SAY


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"conversations": [{"from": "human", "value": ASK["content"]}, SAY]},
        {"prompt": ASK["content"], "completion": "Yes."},
        {"prompt": [ASK], "completion": SAY},
        {"instruction": ASK["content"], "output": "Yes."},
    ],
)
def test_a_system_column_is_the_first_turn(tmp_path: Path, row: dict[str, Any]):
    system = {"role": "system", "content": "Be short."}
    assert read_one(tmp_path, row | {"system": "Be short."}).messages == [system, ASK, SAY]
    assert read_one(tmp_path, row | {"system": None}).messages == [ASK, SAY]
    both = {"messages": [system, ASK, SAY]}
    assert read_one(tmp_path, both | {"system": "Be short."}).messages == [system, ASK, SAY]
    assert "with another text" in wrong(tmp_path, both | {"system": "Be long."})


def test_earlier_exchanges_of_alpaca_and_answers_in_a_prompt(tmp_path: Path):
    row = read_one(tmp_path, {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]})
    assert [(turn["role"], turn["content"]) for turn in row.messages] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip
    assert not any("train" in turn for turn in row.messages)
    assert "exchange 1 of its `history`" in wrong(tmp_path, {"instruction": "c", "output": "d", "history": [["a"]]})
    row = read_one(tmp_path, {"prompt": [ASK, SAY, ASK], "completion": "No."})
    assert row.messages == [ASK, SAY | {"train": False}, ASK, SAY | {"content": "No."}]


# ---- columns


def test_columns_by_name_and_by_template(tmp_path: Path):
    row = {"question": "Rain?", "context": "Oslo", "answer": "Yes.", "doc": 7, "part": "b", "note": "n"}
    columns = (("prompt", "{question}\n\n{context}"), ("completion", "answer"), ("group", "{doc}-{part}"))
    whole = read_one(tmp_path, row, columns=columns, required=("group",))
    assert [turn["content"] for turn in whole.messages] == ["Rain?\n\nOslo", "Yes."]
    assert whole.columns["group"] == "7-b" and whole.group("group") == "7-b"
    gap = read_one(tmp_path, row | {"context": " "}, columns=columns)
    assert gap.messages[0]["content"] == "Rain?"
    gap = read(tmp_path, row, row | {"question": None}, columns=columns).rows[1]
    assert gap.messages[0]["content"] == "Oslo"
    labels = (("prompt", "Question: {question}\nContext: {context}"), ("completion", "answer"))
    gap = read(tmp_path, row, row | {"context": None}, columns=labels).rows[1]
    assert gap.messages[0]["content"] == "Question: Rain?"
    assert "no text as `doc`" in wrong(tmp_path, row | {"doc": [1]}, columns=(("prompt", "{doc}"), *labels[1:]))


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"query": "a", "response": "b", "id": 3}, {"prompt": "query", "completion": "response"}),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            {"prompt": "{instruction}\n\n{context}", "completion": "response"},
        ),
        ({"input": "a", "output": "b"}, {"prompt": "input", "completion": "output"}),
        ({"input": "a", "target": "b"}, {"prompt": "input", "completion": "target"}),
        ({"article": "a", "summary": "b"}, {"prompt": "article", "completion": "summary"}),
        (
            {"Question": "a", "Answer": "b", "system_prompt": "s"},
            {"prompt": "Question", "completion": "Answer", "system": "system_prompt"},
        ),
    ],
)
def test_names_that_the_field_uses_are_proposed(tmp_path: Path, row: dict[str, Any], proposed: dict[str, str]):
    assert propose(row) == proposed
    (problem,) = read(tmp_path, row, row).problems
    assert columns_line(proposed) in problem.next and problem.where == "rows.jsonl:1"
    assert read_one(tmp_path, row, columns=tuple(proposed.items())).messages[-1]["content"] == "b"


def test_other_names_are_shown_with_an_example_and_a_line_to_write(tmp_path: Path):
    (problem,) = read(tmp_path, {"left": "x" * 100, "right": 3}).problems
    assert f'`left`: "{"x" * 59}...' in problem.why and "`right`: 3" in problem.why
    assert "columns: {prompt: COLUMN, completion: COLUMN}" in problem.next


@pytest.mark.parametrize(
    ("row", "line", "turns"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "columns: {completion: chosen}", ["a", "b"]),
        ({"prompt": "a", "chosen": BOTH, "rejected": BOTH}, "columns: {messages: chosen}", SAID),
        ({"chosen": BOTH, "rejected": BOTH}, "columns: {messages: chosen}", SAID),
        (
            {"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt"}},
            "columns: {prompt: conversations, completion: chosen}",
            ["a", "b"],
        ),
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            "columns: {prompt: question, completion: chosen}",
            ["a", "b"],
        ),
        ({"messages": BOTH, "rejected_response": "c"}, "columns: {messages: messages}", SAID),
    ],
)  # fmt: skip
def test_preference_pairs_are_refused_with_the_line_that_takes_the_wanted_answers(
    tmp_path: Path, row: dict[str, Any], line: str, turns: list[str]
):
    (problem,) = read(tmp_path, row, row).problems
    assert line in problem.next and "preference" in problem.what
    columns = tuple(part.split(": ") for part in line.removeprefix("columns: {").removesuffix("}").split(", "))
    assert [turn["content"] for turn in read_one(tmp_path, row, columns=columns).messages] == turns


@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0), ("true", "False")])
def test_verdicts_are_refused_unless_the_recipe_keeps_the_good_ones(tmp_path: Path, good: Any, bad: Any):
    rows = [{"prompt": "a", "completion": "b", "label": good}, {"prompt": "c", "completion": "d", "label": bad}]
    (problem,) = read(tmp_path, *rows).problems
    assert "keep: {label: true}" in problem.next
    kept = read(tmp_path, *rows, keep=(("label", (True,)),))
    assert [row.messages[1]["content"] for row in kept.rows] == ["b"] and kept.left_out == 1
    as_domain = read(tmp_path, *rows, required=("label",), identity=("label",))
    assert len(as_domain.rows) == 2
    assert len(read(tmp_path, {"prompt": "a", "completion": "b", "label": "billing"}).rows) == 1


def test_a_column_that_no_row_has_is_refused(tmp_path: Path):
    row = {"question": "a", "answer": "b"}
    columns = (("prompt", "question"), ("completion", "answer"), ("system", "sytem_prompt"))
    (problem,) = read(tmp_path, row, columns=columns).problems
    assert "sytem_prompt" in problem.what and "question, answer" in problem.next
    (problem,) = read(tmp_path, row, columns=columns[:2], keep=(("lable", (True,)),)).problems
    assert problem.why == "data.keep leaves all 1 rows out" or "lable" in problem.what


def test_rows_that_differ_in_a_column_that_is_read_are_two(tmp_path: Path):
    row = {"prompt": "a", "completion": "b", "schema": "shop", "id": 1}
    names = {
        read_one(tmp_path, row | {"schema": schema, "id": number}, identity=("schema",)).name
        for schema, number in (("shop", 1), ("shop", 2), ("bank", 1))
    }
    assert len(names) == 2
    tools = {"messages": [ASK, SAY], "tools": [TOOL]}
    assert read_one(tmp_path, tools).name != read_one(tmp_path, {"messages": [ASK, SAY]}).name


def test_all_answers_to_a_question_are_one_group(tmp_path: Path):
    rows = [
        {"prompt": "Rain  in Oslo?", "completion": "Yes."},
        {"prompt": "Rain in Oslo? ", "completion": "No."},
        {"messages": [{"role": "user", "content": "Rain in Oslo?"}, SAY, ASK, SAY]},
    ]
    assert len({read_one(tmp_path, row).question for row in rows}) == 1
    assert len({read_one(tmp_path, row | {"system": "Be short."}).question for row in rows}) == 1
    others = [rows[0], rows[0] | {"system": "Be short."}, rows[0] | {"tools": [TOOL]}, rows[0] | {"prompt": "Snow?"}]
    assert len({read_one(tmp_path, row).question for row in others}) == 4


def test_columns_that_nothing_reads_are_named(tmp_path: Path):
    rows = read(tmp_path, {"messages": [ASK, SAY], "id": 1, "kind": "x", "tools": [TOOL]}, required=("kind",))
    assert rows.unused == ["id"]
