"""`quench check --data`: every row."""

import random
from pathlib import Path
from typing import Any

import pytest

from recipes.checks.check import check, check_data
from recipes.checks.rows import TOKENS_PER_INPUT
from recipes.data.rows import read_rows, side
from recipes.problem import Problem
from recipes.read.load import load
from tests.recipes.folders import chat, write_project, write_rows


def problems(recipe: Path, *sets: str) -> list[Problem]:
    of_rows = check_data(load(recipe, sets=sets)).problems
    assert all(part for problem in of_rows for part in problem.as_dict().values())
    return of_rows


def only(recipe: Path, *sets: str) -> Problem:
    (problem,) = problems(recipe, *sets)
    return problem


def test_summary_counts_rows_by_side_and_domain(tmp_path: Path):
    recipe = write_project(tmp_path)
    rows = [chat(number, kind="even" if number % 2 == 0 else "odd") for number in range(300)]
    write_rows(tmp_path / "rows.jsonl", [*rows, rows[7]])
    checked = check_data(load(recipe, sets=["data.domain=kind"]))
    assert checked.problems == []
    assert (checked.summary["rows"], checked.summary["duplicates"]) == (300, 1)
    assert checked.summary["format"] == "messages, detected from rows.jsonl:1"
    expected = {"train": 0, "dev": 0, "test": 0}
    for row in read_rows(tmp_path / "rows.jsonl").rows[:300]:
        expected[side(row.question, salt="", dev=0.1, test=0.15)] += 1
    for name, count in expected.items():
        assert checked.summary[name]["rows"] == count > 0
        assert sum(checked.summary[name]["domains"].values()) == count


def test_malformed_lines_by_number_and_only_twenty(tmp_path: Path):
    recipe = write_project(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [*map(chat, range(200)), "{", *["x"] * 30, "", chat(201)])
    problem = only(recipe)
    assert problem.what.startswith("31 malformed") and problem.where == "rows.jsonl:201"
    assert "rows.jsonl:220" in problem.why and "rows.jsonl:221" not in problem.why and "11 more" in problem.why


def test_rows_without_the_needed_fields(tmp_path: Path):
    recipe = write_project(tmp_path)
    rows = [chat(number, kind="a", thread="t") for number in range(200)]
    bad = [
        chat(200, thread="t"),
        chat(201, kind="a"),
        {"kind": "a", "thread": "t"},
        {"messages": [{"role": "user", "content": "x"}], "kind": "a", "thread": "t"},
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}], "kind": "a", "thread": "t"},
    ]
    write_rows(tmp_path / "rows.jsonl", rows + bad)
    why = only(recipe, "data.domain=kind", "data.group=thread").why
    for line, says in (
        (201, "no `kind`"),
        (202, "no `thread`"),
        (203, "no `messages`"),
        (204, "assistant"),
        (205, "text"),
    ):
        assert f"rows.jsonl:{line}" in why and says in why


def test_a_bad_first_row_is_told_once(tmp_path: Path):
    recipe = write_project(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ["x", *map(chat, range(200)), "y"])
    loaded = load(recipe)
    first, later = [*check(loaded), *check_data(loaded).problems]
    assert first.where == "rows.jsonl:1" and later.where == "rows.jsonl:202"


def test_equal_rows_in_two_groups_could_stand_in_test_and_train(tmp_path: Path):
    recipe = write_project(tmp_path)
    rows = [chat(number, thread=f"t{number}") for number in range(260)]
    other = chat(5, thread="t6")
    other["messages"][0]["content"] += " "  # another row: white space counts
    write_rows(tmp_path / "rows.jsonl", [*rows, chat(3, thread="another"), chat(4, thread="t4"), other])
    problem = only(recipe, "data.group=thread")
    assert "rows.jsonl:4 (t3) and rows.jsonl:261 (another)" in problem.why and problem.what.startswith("1 rows equal")
    assert problem.where.endswith("data.group") and "test row could equal a train row" in problem.what
    assert problems(recipe) == []  # without groups equal rows are one row


def test_only_twenty_torn_rows_are_named(tmp_path: Path):
    recipe = write_project(tmp_path)
    again = [chat(number, thread="another") for number in range(25)]
    write_rows(tmp_path / "rows.jsonl", [*(chat(number, thread=f"t{number}") for number in range(260)), *again])
    problem = only(recipe, "data.group=thread")
    assert problem.what.startswith("25 rows") and problem.why.count("rows.jsonl:") == 40 and "and 5 more" in problem.why


WORDS = [f"w{number}" for number in range(3000)]


def like(number: int, of: int, **columns: Any) -> dict[str, Any]:
    """A row of 60 words; those of one `of` differ in the first word alone."""
    words = random.Random(of).choices(WORDS, k=60)
    said = [
        {"role": "user", "content": " ".join([str(number), *words])},
        {"role": "assistant", "content": f"it is {of}"},
    ]
    return {"messages": said, **columns}


def test_near_twins_across_sides_are_said_and_too_many_refused(tmp_path: Path):
    recipe = write_project(tmp_path)
    rows = [like(number, of=number // 2) for number in range(60)]
    write_rows(tmp_path / "rows.jsonl", [*map(chat, range(300)), *rows])
    problem = only(recipe)
    assert problem.where.endswith("calibrate.max_near_duplicates") and "near-twins (Jaccard >= 0.9)" in problem.what
    leaks = int(problem.what.split(" ", 1)[0])
    assert 3 < leaks < 30 and problem.why.count(" like rows.jsonl:") == min(10, leaks)
    assert "data.near_duplicates: remove" in problem.next
    allowed = check_data(load(recipe, sets=["calibrate.max_near_duplicates=0.2"]))
    assert allowed.problems == [] and allowed.summary["leaks"].startswith(f"{leaks} of ")
    assert allowed.summary["near-duplicates"].startswith("30 rows share 0.9 or more")
    removed = check_data(load(recipe, sets=["data.near_duplicates=remove"]))
    assert removed.problems == [] and removed.summary["leaks"].startswith("0 of ")
    assert removed.summary["test"] == allowed.summary["test"]  # none of test goes
    gone = [allowed.summary[name]["rows"] - removed.summary[name]["rows"] for name in ("train", "dev")]
    assert f"; {sum(gone)} removed" in removed.summary["near-duplicates"] and leaks <= gone[0] <= 30
    ignored = check_data(load(recipe, sets=["data.near_duplicates=ignore"]))
    assert ignored.problems == [] and "not looked for" in ignored.summary["leaks"]
    assert ignored.summary["train"] == allowed.summary["train"]


def test_rows_that_go_on_from_one_conversation_leak_where_a_group_tears_them_apart(tmp_path: Path):
    recipe = write_project(tmp_path)
    rows: list[dict[str, Any]] = [chat(number, id=f"i{number}") for number in range(300)]
    for number in range(60):
        begun = chat(1000 + number // 6)["messages"]
        rows.append({"messages": [*begun, *chat(2000 + number)["messages"]], "id": f"c{number}"})
    write_rows(tmp_path / "rows.jsonl", rows)
    problem = only(recipe, "data.group=id")
    assert " share an answer with all turns before it" in problem.what and " shares with rows.jsonl:" in problem.why
    assert "one value of `id`, or leave it out" in problem.next
    assert problems(recipe) == []  # by default all of them are on the side of their first question


def test_fewer_rows_than_calibration_needs(tmp_path: Path):
    recipe = write_project(tmp_path, rows=190)
    problem = only(recipe, "calibrate.rows=200")
    train = check_data(load(recipe)).summary["train"]["rows"]
    assert f"train has {train} rows" in problem.what and problem.next == f"Set calibrate.rows to {train}."
    write_rows(tmp_path / "rows.jsonl", map(chat, range(140)))
    problem = only(recipe)
    train = check_data(load(recipe)).summary["train"]["rows"]
    assert "at least 171 rows" in problem.next  # 128 / (1 - 0.1 - 0.15)
    assert f"calibrate.rows to {train * 9 // 10} and calibrate.allow_unusual_size to `train has {train} rows`" in (
        problem.next
    )
    assert "calibrate.rows" in problem.where
    few = [f"calibrate.rows={train * 9 // 10}", f"calibrate.allow_unusual_size=train has {train} rows"]
    checked = check_data(load(recipe, sets=few))
    assert checked.problems == [] and checked.warnings[0].what.startswith("The gate cannot pass")


def test_fewer_than_32_rows_of_train_are_refused_whatever_is_allowed(tmp_path: Path):
    recipe = write_project(tmp_path)
    few = ("calibrate.rows=20", "calibrate.allow_unusual_size=few", "data.dev=0.2", "data.test=0.2")
    write_rows(tmp_path / "rows.jsonl", map(chat, range(45)))
    train = check_data(load(recipe, sets=few)).summary["train"]["rows"]
    problem = only(recipe, *few)
    assert train < 32 and problem.what == f"train has {train} rows; at least 32 are needed."
    assert "about 54 rows or more" in problem.next and problem.where.endswith("data.path")
    write_rows(tmp_path / "rows.jsonl", map(chat, range(90)))
    assert problems(recipe, *few) == []


def test_too_few_tokens_for_the_widest_layer(tmp_path: Path):
    recipe = write_project(tmp_path, intermediate=32768)
    problem = only(recipe)
    assert str(4 * 32768) in problem.what and "Hessian" in problem.why


def test_too_few_tokens_with_the_rows_that_could_do(tmp_path: Path):
    recipe = write_project(tmp_path, rows=400, intermediate=7168)  # 28,672 tokens; a row has 167 bytes or so
    problem = only(recipe)
    needed = int(problem.next.removeprefix("Raise calibrate.rows to ").removesuffix(" or more."))
    assert 128 < needed <= 300
    assert problems(recipe, f"calibrate.rows={needed}") == []
    assert problem.next.startswith("Raise") and problems(recipe, f"calibrate.rows={needed - 2}")


def test_shares_of_domains_that_train_cannot_give(tmp_path: Path):
    recipe = write_project(tmp_path)
    rows = [chat(number, kind="even" if number % 10 == 0 else "odd") for number in range(300)]
    write_rows(tmp_path / "rows.jsonl", rows)
    shares = "calibrate.stratify={even: 0.5, odd: 0.5}"
    problem = only(recipe, "data.domain=kind", shares)
    assert (
        problem.where.endswith("calibrate.stratify") and "of the domain `even`; its share is 0.5 of 128" in problem.what
    )
    assert problems(recipe, "data.domain=kind", "calibrate.stratify={even: 0.1, odd: 0.9}") == []
    assert "has 0 rows of the domain `none`" in only(recipe, "data.domain=kind", "calibrate.stratify={none: 1.0}").what


def test_text_that_is_calibrated_on_and_evaluated(tmp_path: Path):
    recipe = write_project(tmp_path)
    write_rows(tmp_path / "general.jsonl", [{"text": f"text {i}"} for i in range(9)])
    write_rows(tmp_path / "other.jsonl", [{"text": "text  3"}, {"text": "another"}])  # equal but for white space
    sets = ("data.general=general.jsonl", "calibrate.general=other.jsonl")
    problem = only(recipe, *(override.replace("=", f"={tmp_path}/") for override in sets))
    assert problem.what.startswith("1 texts are in") and problem.where.endswith("calibrate.general")
    write_rows(tmp_path / "other.jsonl", [{"text": "another"}, {"txt": "another"}])
    assert only(recipe, *(one.replace("=", f"={tmp_path}/") for one in sets)).where.endswith("other.jsonl:2")


def test_the_same_tokens_an_input_as_the_calibrate_step():
    tasks = pytest.importorskip("tasks.calibrate")
    assert TOKENS_PER_INPUT == tasks.TOKENS_PER_INPUT


@pytest.mark.parametrize("name", ["dev", "test"])
def test_an_empty_side_is_refused(tmp_path: Path, name: str):
    recipe = write_project(tmp_path)
    write_rows(tmp_path / "rows.jsonl", (chat(number, thread="one") for number in range(400)))
    empty = problems(recipe, "data.group=thread")
    (problem,) = (problem for problem in empty if problem.what == f"{name} would have no rows.")
    assert "there are 1 in all for three sides" in problem.why and "finer data.group" in problem.next
    write_rows(tmp_path / "rows.jsonl", (chat(number, thread="two" if number else "one") for number in range(400)))
    assert any("there are 2 in all" in problem.why for problem in problems(recipe, "data.group=thread"))
    sets = (f"data.{name}=0.001", "data.salt=b")
    write_rows(tmp_path / "rows.jsonl", map(chat, range(200)))
    (problem,) = (problem for problem in problems(recipe, *sets) if problem.what == f"{name} would have no rows.")
    assert f"raise data.{name}" in problem.next


def test_every_general_row_and_database(tmp_path: Path):
    recipe = write_project(tmp_path, extra="evaluate:\n  scorers: [{kind: sql-execution, databases: db}]\n")
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "shop.sql").write_text("")
    rows = [chat(number, schema="zoo" if number == 100 else "shop") for number in range(260)]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "general.jsonl", [{"text": "x"}, {"text": 3}])
    general, database = problems(recipe, "data.general=general.jsonl")
    assert general.where.endswith("general.jsonl:2")
    assert "zoo.sql" in database.what and database.where == "rows.jsonl:101"


def test_data_on_the_hub_is_left_for_later(tmp_path: Path):
    checked = check_data(load(write_project(tmp_path), sets=["data.path=org/rows"]))
    assert checked.problems == [] and "pinned" in checked.summary["data"]


SOURCES = "data.sources=[{path: rows.jsonl, weight: 0.5, domain: a}, {path: more, domain: b}]"


def test_several_sources_are_read_drawn_and_named(tmp_path: Path):
    recipe = write_project(tmp_path, rows=400)
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "more" / "pairs.jsonl", ({"instruction": f"n {i}", "output": "x"} for i in range(100)))
    checked = check_data(load(recipe, sets=["data.path=null", SOURCES]))
    assert checked.problems == []
    whole = check_data(load(recipe, sets=["data.path=null", SOURCES.replace("0.5", "1.0")])).summary
    assert whole["rows"] == 500 and checked.summary["rows"] == 500 - checked.summary["left out by weight"]
    for name in ("dev", "test"):
        assert checked.summary[name] == whole[name]
    drawn, before = (summary["train"]["domains"] for summary in (checked.summary, whole))
    assert drawn["b"] == before["b"] and drawn["a"] < before["a"]
    assert checked.summary["format"].endswith("; alpaca, detected from more/pairs.jsonl:1")
    write_rows(tmp_path / "more" / "pairs.jsonl", [*map(chat, range(400, 500)), "x"])
    problem = only(recipe, "data.path=null", SOURCES)
    assert problem.where == "more/pairs.jsonl:101" and "malformed" in problem.what


def test_a_missing_source_is_named_by_its_field(tmp_path: Path):
    loaded = load(write_project(tmp_path), sets=["data.path=null", SOURCES])
    (problem,) = [*check(loaded), *check_data(loaded).problems]
    assert problem.where.endswith("data.sources.1.path") and "not there" in problem.what


def test_a_part_of_the_data_on_the_hub_is_left_for_later(tmp_path: Path):
    checked = check_data(load(write_project(tmp_path), sets=["data.path=null", SOURCES.replace("more", "org/more")]))
    assert checked.problems == [] and "org/more is not local" in checked.summary["data"]
    assert checked.summary["rows"] == sum(checked.summary[side]["rows"] for side in ("train", "dev", "test")) > 100
