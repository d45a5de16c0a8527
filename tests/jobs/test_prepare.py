"""Prepare: formats, refusals by line, de-duplication, split, completion masks, truncation, what travels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from recipes.data.origin import source_name
from recipes.data.rows import content_hash, read_rows, side
from tasks.jobs import prepare
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.rendering import Renderer
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tests.jobs.build import make_job, notes, write_jsonl
from tests.tiny import MARKED, PLAIN, write_base

PARAMS = {
    "sources": [{"format": "auto", "weight": 1.0, "domain": None}],
    "domain": None,
    "group": None,
    "dev": 0.2,
    "test": 0.2,
    "salt": "",
    "max_length": 256,
    "near_duplicates": "count",
    "near_duplicate_jaccard": 0.9,
    "scored_columns": [],
    "chat_template": None,
}
END = 2
# Llama-3-type: a beginning-of-text token from the template, trimmed contents, no markers.
HEADERS = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n\n' -}}{%- endif -%}"
)
# Markers that leave the end of the turn outside, and a generation prompt that no turn begins with.
OUTSIDE = MARKED.replace("+ '<|im_end|>' -}}{%- endgeneration -%}", "-}}{%- endgeneration -%}{{- '<|im_end|>' -}}")
UNPROMPTED = PLAIN.replace("assistant\n' -}}{%- endif", "assistant\n\n' -}}{%- endif")


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Turns of user and assistant by turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def questions(count: int) -> list[dict[str, Any]]:
    return [{"messages": chat(f"what is {i} ?", f"it is {i}")} for i in range(count)]


def run(tmp_path: Path, rows: list[Any], *, base: Path | None = None, name: str = "out", **params: Any) -> Path:
    """Prepare these rows and return the dataset folder."""
    data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    base = base or write_base(tmp_path / "base")
    prepare.run(make_job("prepare", tmp_path / name, params=PARAMS | params, data=data, tokenizer=base))
    return tmp_path / name


def table(dataset: Path) -> list[dict[str, Any]]:
    """Rows of the dataset, but for where each was read: tests write the same rows into several files."""
    return pq.read_table(dataset / "rows.parquet").drop_columns("source").to_pylist()


def completions(renderer: Renderer, row: dict[str, Any]) -> list[str]:
    """The texts of the trained spans."""
    spans: list[list[int]] = []
    previous = False
    for token, inside in zip(row["input_ids"], row["completion_mask"], strict=True):
        if inside:
            spans = spans if previous else [*spans, []]
            spans[-1].append(token)
        previous = inside
    return [renderer.tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("template", ["marked", "plain", HEADERS, OUTSIDE])
def test_the_mask_is_every_assistant_turn_with_its_end(tmp_path: Path, template: str) -> None:
    base = write_base(tmp_path / "base", chat_template=template, bos=True)
    turns = chat("what ?", "blue", "sure ?", "yes it is", system="be short")
    dataset = run(tmp_path, [*questions(60), {"messages": turns}], base=base)
    row = next(row for row in table(dataset) if row["row"] == content_hash(turns)[:16])
    renderer = Renderer.open(base)
    assert completions(renderer, row) == ["blue<|im_end|>", "yes it is<|im_end|>"]
    assert row["answer"] == "yes it is"
    length = len(row["prompt_ids"])
    assert row["input_ids"][:length] == row["prompt_ids"]
    assert row["completion_mask"][length:].index(True) == 0  # decoding starts where the last completion does
    assert row["input_ids"].count(3) == (template == HEADERS)  # beginning of text: once if the template has one


def test_markers_and_prefixes_give_the_same_mask(tmp_path: Path) -> None:
    marked, plain = (
        run(tmp_path, questions(60), base=write_base(tmp_path / f"b-{t}", chat_template=t), name=t)
        for t in ("marked", "plain")
    )
    assert table(marked) == table(plain)
    assert "generation markers" in json.loads((marked / "summary.json").read_text())["mask_from"]
    assert "prefixes" in json.loads((plain / "summary.json").read_text())["mask_from"]


def test_a_template_that_cannot_be_masked_is_refused_by_row_and_turn(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=UNPROMPTED)
    with pytest.raises(StageError, match=r"out\.jsonl:60 turn 3: .* generation prompt") as refused:
        run(tmp_path, [*questions(59), {"messages": chat("a", "b", "c", "d", system="short")}], base=base)
    assert refused.value.problem.what.startswith("60 row(s)")


def test_one_row_is_logged_with_its_trained_tokens_marked(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", questions(60))
    job = make_job("prepare", tmp_path / "out", params=PARAMS, data=data, tokenizer=write_base(tmp_path / "base"))
    prepare.run(job)
    assert "⟦it is " in notes(job)["example"]
    assert "<|im_end|>⟧" in notes(job)["example"]
    assert notes(job)["format"] == "messages, detected from rows.jsonl:1; 60 rows"


def test_prompt_and_completion_are_detected(tmp_path: Path) -> None:
    pairs = [{"prompt": f"what is {i} ?", "completion": f"it is {i}"} for i in range(60)]
    base = write_base(tmp_path / "base")
    assert table(run(tmp_path, pairs, base=base, name="pairs")) == table(run(tmp_path, questions(60), base=base))
    assert json.loads((tmp_path / "pairs" / "summary.json").read_text())["format"] == "prompt-completion"


def test_all_malformed_rows_are_named_at_once(tmp_path: Path) -> None:
    bad = [
        {"prompt": "x", "completion": "y"},
        {"messages": chat("a", "b", "c")},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": chat("a", " ")},
        [],
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(2), *bad])
    path.write_text(path.read_text() + "\n{broken\n")
    (problem,) = read_rows(path).problems
    assert problem.what == "7 malformed row(s)"
    assert problem.where == "rows.jsonl:3"
    for line in (3, 4, 5, 6, 7, 8, 10):  # line 9 is blank
        assert f"rows.jsonl:{line} " in problem.why
    with pytest.raises(StageError, match="7 malformed"):
        job = make_job("prepare", tmp_path / "out", params=PARAMS, data=path, tokenizer=write_base(tmp_path / "base"))
        prepare.run(job)


def test_only_the_first_twenty_are_listed(tmp_path: Path) -> None:
    (problem,) = read_rows(write_jsonl(tmp_path / "rows.jsonl", [*questions(1), *[{"a": 1}] * 30])).problems
    assert problem.what == "30 malformed row(s)"
    assert problem.why.count("rows.jsonl:") == 20
    assert "and 10 more" in problem.why


@pytest.mark.parametrize("column", ["domain", "group", "scored_columns"])
def test_a_row_without_a_named_column_is_malformed(tmp_path: Path, column: str) -> None:
    columns = {column: ["kind"] if column == "scored_columns" else "kind"}
    rows = [row | {"kind": "a"} for row in questions(60)]
    del rows[40]["kind"]
    with pytest.raises(StageError, match=r"out\.jsonl:41 has no `kind`"):
        run(tmp_path, rows, **columns)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no training rows"):
        run(tmp_path, [])


def test_duplicates_are_equal_to_the_last_space(tmp_path: Path) -> None:
    again = [{"messages": chat(" what  is 1 ?", "it is 1")}, questions(3)[2]]
    dataset = run(tmp_path, [*questions(60), *again])
    assert json.loads((dataset / "summary.json").read_text())["duplicates"] == 1
    rows = {row["row"]: row["source"] for row in pq.read_table(dataset / "rows.parquet").to_pylist()}
    assert len(rows) == 61
    assert rows[content_hash(questions(3)[2]["messages"])[:16]] == "out.jsonl:3"  # the first of equal rows stays


def test_rows_that_a_scorer_tells_apart_are_no_duplicates(tmp_path: Path) -> None:
    rows = [row | {"schema": "a"} for row in questions(60)]
    rows += [rows[7] | {"schema": "b"}, rows[8] | {"note": "the same row"}]
    dataset = run(tmp_path, rows, scored_columns=["schema"])
    assert json.loads((dataset / "summary.json").read_text())["duplicates"] == 1
    twice = [row for row in table(dataset) if row["answer"] == "it is 7"]
    assert {json.loads(row["columns"])["schema"] for row in twice} == {"a", "b"}
    assert len({row["split"] for row in twice}) == 1  # they have one question


def test_rows_that_truncation_makes_equal_do_not_straddle_the_split(tmp_path: Path) -> None:
    long = [{"messages": chat("abc " * 30 + str(i), "x", "and the last ?", "the same")} for i in range(40)]
    dataset = run(tmp_path, [*questions(60), *long], max_length=64)
    assert [row["answer"] for row in table(dataset)].count("the same") == 1
    assert json.loads((dataset / "summary.json").read_text())["duplicates"] == 39


def test_truncation_drops_whole_leading_exchanges_and_keeps_the_system_turn(tmp_path: Path) -> None:
    turns = chat("first " * 20, "one", "second ?", "two", "third ?", "three", system="short")
    much = chat("first ?", "one", "last ?", "x" * 100)
    dataset = run(tmp_path, [*questions(60), {"messages": turns}, {"messages": much}], max_length=90)
    row = next(row for row in table(dataset) if row["dropped_turns"])
    assert json.loads(row["messages"]) == [turns[0], *turns[3:]]
    assert completions(Renderer.open(tmp_path / "base"), row) == ["two<|im_end|>", "three<|im_end|>"]
    summary = json.loads((dataset / "summary.json").read_text())
    assert (summary["truncated_rows"], summary["dropped_turns"], summary["too_long_rows"]) == (1, 2, 1)
    assert summary["length_tokens"]["p100"] <= 90


def test_a_system_turn_goes_before_the_row_does(tmp_path: Path) -> None:
    turns = chat("what ?", "blue", system="s" * 100)
    dataset = run(tmp_path, [*questions(60), {"messages": turns}], max_length=60)
    row = next(row for row in table(dataset) if row["dropped_turns"])
    assert json.loads(row["messages"]) == turns[1:]


def test_membership_is_stable_under_growth_and_follows_groups(tmp_path: Path) -> None:
    rows = [row | {"family": f"f{i % 30}"} for i, row in enumerate(questions(200))]
    base = write_base(tmp_path / "base")
    small = {row["row"]: row for row in table(run(tmp_path, rows[:120], base=base, name="small", group="family"))}
    large = {row["row"]: row for row in table(run(tmp_path, rows, base=base, name="large", group="family"))}
    assert len(large) == 200
    assert all(large[name]["split"] == row["split"] for name, row in small.items())
    sides: dict[str, set[str]] = {}
    for row in large.values():
        sides.setdefault(row["group"], set()).add(row["split"])
    assert len(sides) == 30
    assert all(len(one) == 1 for one in sides.values())


def test_the_split_has_its_shares_and_another_salt_draws_another() -> None:
    names = [str(i) for i in range(20000)]
    first = [side(name, salt="", dev=0.1, test=0.15) for name in names]
    assert first.count("test") / 20000 == pytest.approx(0.15, abs=0.01)  # 4 standard deviations of a share
    assert first.count("dev") / 20000 == pytest.approx(0.10, abs=0.01)
    assert first != [side(name, salt="x", dev=0.1, test=0.15) for name in names]


def test_an_empty_side_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="would have no rows") as refused:
        run(tmp_path, [row | {"family": "all"} for row in questions(60)], group="family")
    assert "data.salt" in refused.value.problem.next


def test_general_rows_are_cut_and_counted(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "general.jsonl", [{"text": "word " * 50}, {"text": "short one"}, {"text": "."}])
    base = write_base(tmp_path / "base", bos=True)
    data = write_jsonl(tmp_path / "rows.jsonl", questions(60))
    job = make_job(
        "prepare", tmp_path / "out", params=PARAMS | {"max_length": 40}, data=data, general=texts, tokenizer=base
    )
    prepare.run(job)
    rows = {len(row["input_ids"]): row for row in pq.read_table(tmp_path / "out" / "general.parquet").to_pylist()}
    assert max(rows) == 40
    assert all(row["input_ids"].count(3) == 1 and row["input_ids"][0] == 3 for row in rows.values())
    assert {row["n_chars"] for row in rows.values()} >= {len("short one")}


def test_a_data_folder_gives_its_train_files(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "train-0.jsonl", questions(3))
    write_jsonl(folder / "data" / "other.jsonl", questions(9))
    assert len(read_rows(folder).rows) == 3
    (folder / "data" / "train-0.jsonl").unlink()
    assert len(read_rows(folder).rows) == 9
    (folder / "data" / "other.jsonl").unlink()
    (problem,) = read_rows(folder).problems
    assert "no *.jsonl" in problem.why


def test_tokenizer_files_travel_byte_for_byte(tmp_path: Path) -> None:
    dataset = run(tmp_path, questions(60))
    names = {path.name for path in (dataset / "tokenizer").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name in names:
        assert (dataset / "tokenizer" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


@pytest.mark.parametrize("ends", [None, [0], 0])
def test_the_end_of_turn_ends_an_answer(tmp_path: Path, ends: Any) -> None:
    base = write_base(tmp_path / "base")
    if ends is None:
        (base / "generation_config.json").unlink()
    else:
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "top_p": 0.9}))
    dataset = run(tmp_path, questions(60), base=base)
    config = json.loads((dataset / "tokenizer" / "generation_config.json").read_text())
    assert config["eos_token_id"][0] == END
    assert ends is None or (config["eos_token_id"] == [END, 0] and config["top_p"] == 0.9)


def test_a_base_without_a_template_is_refused_and_chatml_is_saved(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=False)
    with pytest.raises(StageError, match="no chat template") as refused:
        run(tmp_path, questions(60), base=base)
    assert "chatml" in refused.value.problem.next
    dataset = run(tmp_path, questions(60), base=base, name="again", chat_template="chatml")
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    like = AutoTokenizer.from_pretrained(write_base(tmp_path / "marked"))
    turns = chat("what ?", "blue", system="short")
    assert tokenizer.apply_chat_template(turns) == like.apply_chat_template(turns)
    assert completions(Renderer.open(dataset / "tokenizer"), table(dataset)[0])[0].endswith("<|im_end|>")


def test_chatml_begins_with_bos_where_the_tokenizer_does(tmp_path: Path) -> None:
    renderer = Renderer.open(write_base(tmp_path / "base", chat_template=False, bos=True), template="chatml")
    assert renderer.render(Conversation.of(chat("what ?", "blue"))).input_ids[:2] == [3, 1]


def test_a_template_of_the_recipe_beside_the_bases_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="another one"):
        run(tmp_path, questions(60), chat_template="chatml")


def test_a_template_whose_turns_do_not_end_is_refused(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    )
    with pytest.raises(StageError, match="no special token"):
        run(tmp_path, questions(60), base=base)


def test_two_beginning_of_text_tokens_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template="{{ bos_token }}" + HEADERS, bos=True)
    with pytest.raises(RowError, match="two beginning-of-text"):
        Renderer.open(base).render(Conversation.of(chat("a", "b")))


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    first = run(tmp_path, questions(80), base=base, name="a")
    bytes_of_first = (first / "rows.parquet").read_bytes()
    shutil.rmtree(first)
    assert (run(tmp_path, questions(80), base=base, name="a") / "rows.parquet").read_bytes() == bytes_of_first
    turned = run(tmp_path, list(reversed(questions(80))), base=base, name="b")
    assert table(turned) == table(first)
    sources = {row["row"]: row["source"] for row in pq.read_table(turned / "rows.parquet").to_pylist()}
    assert sources[content_hash(questions(80)[0]["messages"])[:16]] == "b.jsonl:80"


def source(**changed: Any) -> dict[str, Any]:
    return {"format": "auto", "weight": 1.0, "domain": None} | changed


def run_sources(tmp_path: Path, sources: list[dict[str, Any]], *data: Path, name: str = "out", **params: Any) -> Job:
    """Prepare these files, one a source."""
    inputs = {source_name(number): path for number, path in enumerate(data)}
    base = tmp_path / "base" if (tmp_path / "base").exists() else write_base(tmp_path / "base")
    job = make_job("prepare", tmp_path / name, params=PARAMS | params | {"sources": sources}, tokenizer=base, **inputs)
    prepare.run(job)
    return job


def test_what_long_rows_lose_is_counted(tmp_path: Path) -> None:
    long = [{"messages": chat("abc " * n + "?", "x", f"last {n} ?", "y")} for n in (20, 30, 50)]
    much = {"messages": chat("what ?", "z" * 200)}
    data = write_jsonl(tmp_path / "rows.jsonl", [*questions(60), *long, much])
    job = run_sources(tmp_path, [source()], data, max_length=64)
    renderer = Renderer.open(tmp_path / "base")
    lost = sorted(
        len(renderer.render(Conversation(turns=one["messages"])).input_ids)
        - len(renderer.render(Conversation(turns=one["messages"][2:])).input_ids)
        for one in long
    )
    summary = json.loads((job.out / "summary.json").read_text())
    expected = {"rows": 3, "tokens": sum(lost), "median_tokens": lost[1], "most_tokens": lost[2]}
    assert summary["cut"] == expected
    assert summary["too_long_tokens"] == len(renderer.render(Conversation(turns=much["messages"])).input_ids)
    assert f"3 rows were over 64 tokens and lost {sum(lost)} tokens" in notes(job)["long rows"]
    assert "1 rows of" in notes(job)["too long"]


def test_plain_text_is_trained_whole_and_asks_nothing(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text number {i} ends here"} for i in range(60)])
    write_jsonl(texts, [*map(json.loads, texts.read_text().splitlines()), {"text": "word " * 100}])
    chats = write_jsonl(tmp_path / "chats.jsonl", questions(60))
    job = run_sources(tmp_path, [source(), source()], texts, chats, max_length=60)
    rows = [row for row in table(job.out) if not row["prompt_ids"]]
    tokenizer = Renderer.open(tmp_path / "base").tokenizer
    whole = [*tokenizer("text number 7 ends here")["input_ids"], tokenizer.eos_token_id]
    assert whole in [row["input_ids"] for row in rows]
    assert len(rows) == 61 and all(all(row["completion_mask"]) and row["answer"] == "" for row in rows)
    assert {row["split"] for row in rows} == {"train", "dev", "test"}
    (cut,) = [row for row in rows if row["input_ids"][-1] != tokenizer.eos_token_id]
    lost = len(tokenizer("word " * 100)["input_ids"]) + 1 - len(cut["input_ids"])
    assert len(cut["input_ids"]) == 60 and json.loads((job.out / "summary.json").read_text())["cut"]["tokens"] == lost
    assert "not in the task score" in notes(job)["plain text"] and notes(job)["example text"].endswith("⟧")
