"""What leaks from train into dev and test, and what data.near_duplicates does about it."""

import random
from pathlib import Path
from typing import Any

import pytest

from recipes.data.rows import Side, content_hash
from recipes.doubles.search import Doubles, DoubleSearch, leak_problem
from tests.recipes.folders import chat

WORDS = [f"w{number}" for number in range(4000)]
LONG = " ".join(WORDS[:100])


def told(said: str, answer: str = "yes", *more: str) -> list[dict[str, Any]]:
    """Turns of the user and the assistant by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate([said, answer, *more])]


def search(folder: Path, rows: list[tuple[Side, list[dict[str, Any]]]], **options: Any) -> Doubles:
    """Of these rows, and 40 others on each side that are like none."""
    found = DoubleSearch(folder)
    for side, turns in rows:
        found.add(content_hash(turns)[:16], side, turns)
    draw = random.Random(0)
    for side in ("train", "dev", "test"):
        for _ in range(40):
            turns = told(" ".join(draw.choices(WORDS, k=30)), draw.choice(WORDS))
            found.add(content_hash(turns)[:16], side, turns)
    return found.find(**{"mode": "count", "jaccard": 0.9, **options})


@pytest.mark.parametrize("side", ["dev", "test"])
def test_near_twins_across_sides_are_leaks(tmp_path: Path, side: Side) -> None:
    doubles = search(tmp_path, [("train", told(f"{LONG} a")), (side, told(f"{LONG} b")), ("train", told("no twin"))])
    assert doubles.leaks.twins == [(0, 1)] and doubles.leaks.rows == 1 and doubles.leaks.train == 42
    assert (doubles.near["rows"], doubles.near["across_sides"], doubles.near["removed"]) == (1, 1, 0)
    said = doubles.leaks.words(lambda row: f"rows.jsonl:{row + 1}")
    assert "1 of 42 train rows" in said and said.endswith("rows.jsonl:1 like rows.jsonl:2")


def test_twins_on_one_side_are_counted_and_no_leak(tmp_path: Path) -> None:
    doubles = search(tmp_path, [("train", told(f"{LONG} a")), ("train", told(f"{LONG} b"))])
    assert doubles.near["train"] == 1 and doubles.leaks.rows == 0


def test_a_row_like_one_of_dev_leaks_also_where_that_is_a_twin_of_test(tmp_path: Path) -> None:
    """97 of 103 grams are shared with dev, and only 92 of 108 with test."""
    rows: list[tuple[Side, list[dict[str, Any]]]] = [
        ("test", told(" ".join([*WORDS[4:100], "b", "c", "d", "e"]))),
        ("dev", told(LONG)),
        ("train", told(" ".join([*WORDS[:96], "f", "g"]))),
    ]
    doubles = search(tmp_path, rows, jaccard=0.8)
    assert doubles.leaks.twins == [(2, 1)] and doubles.near["dev"] == 1


def test_remove_takes_the_twins_out_of_train_first(tmp_path: Path) -> None:
    rows: list[tuple[Side, list[dict[str, Any]]]] = [
        ("train", told(f"{LONG} a")),
        ("test", told(f"{LONG} b")),
        ("dev", told(f"{LONG} c")),
    ]
    doubles = search(tmp_path, rows, mode="remove")
    assert doubles.removed.tolist()[:3] == [True, False, True] and doubles.removed.sum() == 2
    assert doubles.near["removed"] == 2 and doubles.leaks.rows == 0 and doubles.leaks.train == 40


@pytest.mark.parametrize("mode", ["count", "remove"])
def test_leaks_are_told_from_0_9_on_whatever_the_limit_of_near_duplicates_is(tmp_path: Path, mode: str) -> None:
    twins: list[tuple[Side, list[dict[str, Any]]]] = [  # 93 of 103 grams are shared, and 97 of 101
        ("train", told(" ".join([*WORDS[:98], "a", "b"]))),
        ("test", told(LONG)),
    ]
    strict = search(tmp_path, twins, mode=mode, jaccard=0.98)
    assert strict.near["rows"] == 0 and strict.leaks.twins == [(0, 1)]
    far: list[tuple[Side, list[dict[str, Any]]]] = [
        ("train", told(" ".join([*WORDS[:80], *WORDS[200:220]]))),
        ("test", told(LONG)),
    ]
    loose = search(tmp_path, far, mode=mode, jaccard=0.5)
    assert loose.near["rows"] == 1 and loose.leaks.twins == []


def test_exchanges_of_train_that_are_held_out_are_leaks(tmp_path: Path) -> None:
    begun = told("how do I sail ?", "with the wind")
    rows: list[tuple[Side, list[dict[str, Any]]]] = [
        ("train", [*begun, *told("and against it ?", "you tack, from one side to the other and back again")]),
        ("test", [*begun, *told("what is a jib ?", "the sail in front of the mast, the smaller one of both")]),
        ("train", told("how do I sail ?", "with a boat")),  # another answer
        ("train", told("how do I  sail ?", "with the wind")),  # another question
        ("train", [{"role": "system", "content": "be brief"}, *begun]),  # another history
        ("train", begun),
    ]
    leaks = search(tmp_path, rows).leaks
    assert leaks.exchanges == [(0, 1), (5, 1)] and leaks.twins == [] and leaks.rows == 2
    assert "2 share an answer with all turns before it" in leaks.words(str)


def test_context_greetings_and_other_tools_are_no_exchanges(tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "hello, what can I do for you ?"}
    context = told("how do I sail ?", "with the wind")
    context[1]["train"] = False
    rows: list[tuple[Side, list[dict[str, Any]]]] = [
        ("train", [greeting, *told("what is a mast ?", "a pole")]),
        ("test", [greeting, *told("what is a hull ?", "a shell")]),
        ("train", [*context, *told("and against it ?", "you tack")]),
        ("test", told("how do I sail ?", "with the wind")),
    ]
    assert search(tmp_path, rows).leaks.exchanges == []
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    with_tools = DoubleSearch(tmp_path)
    for name, side, tools in (("0" * 16, "train", [tool]), ("1" * 16, "test", None), ("2" * 16, "dev", [tool])):
        with_tools.add(name, side, told("rain ?", "no"), tools)
    assert with_tools.find(mode="count", jaccard=0.9).leaks.exchanges == [(0, 2)]


def test_plain_texts_have_twins_and_no_exchanges(tmp_path: Path) -> None:
    rows: list[tuple[Side, list[dict[str, Any]]]] = [
        (side, [{"role": "text", "content": f"{LONG} {side}"}]) for side in ("train", "test")
    ]
    leaks = search(tmp_path, rows).leaks
    assert leaks.twins == [(0, 1)] and leaks.exchanges == []


def test_more_leaks_than_allowed_are_refused_with_what_helps() -> None:
    counts = {"train": 200, "rows": 2, "twins": 2, "exchanges": 0}
    assert leak_problem(counts, most=0.01, examples="", group=None) is None
    problem = leak_problem(counts | {"rows": 3, "twins": 3}, most=0.01, examples="\n    a like b", group=None)
    assert problem is not None and problem.what.startswith("3 of 200 train rows") and "0.01 of train" in problem.why
    assert "data.near_duplicates: remove" in problem.next and "first question" not in problem.next
    problem = leak_problem(counts | {"rows": 3, "twins": 0, "exchanges": 3}, most=0.01, examples="", group="id")
    assert problem is not None and "`id`, or leave it out" in problem.next and "remove" not in problem.next


def test_no_rows_have_no_doubles(tmp_path: Path) -> None:
    doubles = DoubleSearch(tmp_path).find(mode="remove", jaccard=0.9)
    assert doubles.near["rows"] == 0 and doubles.leaks == (0, [], [], 0)


def test_rows_of_the_small_project_do_not_leak(tmp_path: Path) -> None:
    found = DoubleSearch(tmp_path)
    for number in range(300):
        turns = chat(number)["messages"]
        found.add(content_hash(turns)[:16], ("train", "dev", "test")[number % 3], turns)
    assert found.find(mode="count", jaccard=0.9).leaks.rows == 0
