"""Every scorer of the rows' answers: what counts, what cannot cheat, what is refused."""

from __future__ import annotations

import json
import re
import socket
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from recipes.schema import Evaluate
from recipes.scorers import NUMBER
from tasks.jobs.scorers import Scorer, make_scorer, sql_execution
from tasks.jobs.scorers.number import NumberScorer
from tasks.jobs.scorers.sql_execution import orders
from tasks.runtime.process.errors import StageError

SCRIPT = """
CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT, pages INTEGER, price REAL);
INSERT INTO books VALUES (1, 'Winter', 100, 1.5), (2, 'River', 300, 2.25), (3, 'Winter', 200, 4.0);
"""
LIBRARY = {"schema": "library"}
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"


@pytest.fixture
def score(tmp_path: Path) -> Scorer:
    (tmp_path / "library.sql").write_text(SCRIPT)
    return make_scorer({"kind": "sql-execution", "schema_column": "schema"}, tmp_path)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("SELECT title FROM books", "select title from books;", 1),
        ("SELECT title FROM books ORDER BY id DESC", "SELECT title FROM books", 1),  # a multiset
        ("SELECT DISTINCT title FROM books", "SELECT title FROM books", 0),  # of which duplicates are part
        ("SELECT title FROM books ORDER BY pages DESC", "SELECT title FROM books ORDER BY pages", 0),
        ("SELECT title FROM books ORDER BY pages", "SELECT title FROM books ORDER BY lower(title)", 0),
        ("SELECT sum(pages) / count(*) FROM books", "SELECT avg(pages) FROM books", 1),  # 200 = 200.0
        ("SELECT sum(price) / count(price) FROM books", "SELECT avg(price) FROM books", 1),
        (
            "SELECT id, title FROM books WHERE id > 9",
            "SELECT title FROM books WHERE id > 9",
            0,
        ),  # no rows, other columns
        ("SELECT 'ORDER BY' FROM books", "SELECT 'ORDER BY' FROM books", 1),
    ],
)
def test_rows_decide(score: Scorer, answer: str, reference: str, expected: int) -> None:
    assert score(answer, reference, LIBRARY) == (expected, "")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("SELECT colour FROM books", "no such column"),
        ("DELETE FROM books", "not authorized"),
        ("PRAGMA writable_schema = 1", "not authorized"),
        ("ATTACH DATABASE 'x.db' AS x", "not authorized"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("", "not a query"),
        ("I do not know", "syntax error"),
        ("SELECT title FROM books\0", "null character"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n", "interrupted"),
        ("SELECT length(zeroblob(100000000))", "too big"),
        ("SELECT load_extension('./evil')", "not authorized"),
        ("SELECT title FROM books WHERE title LIKE '" + "%a" * 600 + "'", "pattern too complex"),
        ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "stack overflow"),
        ("SELECT 1 --" + "-" * 100_000, "too large"),
        (f"{ENDLESS} SELECT group_concat(i) FROM n", "interrupted"),
        (f"{ENDLESS} SELECT randomblob(900000) AS b FROM n ORDER BY b", "MiB of memory"),
        ("SELECT count(*) FROM books" + ", books" * 15, "interrupted"),
    ],
)
def test_what_does_not_run_scores_0_with_the_reason(score: Scorer, answer: str, error: str) -> None:
    clock = time.perf_counter()
    verdict = score(answer, "SELECT title FROM books", LIBRARY)
    assert verdict.score == 0
    assert error in verdict.error
    assert time.perf_counter() - clock < 20  # the endless query ends after 5 million steps, 0.2 s alone
    assert score("SELECT count(*) FROM books", "SELECT 3", LIBRARY).score == 1  # and nothing was deleted


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM t order  by count(b) LIMIT 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE a IN (SELECT max(a) FROM t GROUP BY b ORDER BY count(b))", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t WHERE b = 'x) ORDER BY (y'", False),
    ],
)
def test_only_the_outermost_order_counts(query: str, expected: bool) -> None:
    assert orders(query) is expected


def test_bad_data_is_refused_not_scored(score: Scorer) -> None:
    with pytest.raises(StageError, match="a reference answer does not run"):
        score("SELECT 1", "SELECT colour FROM books", LIBRARY)
    with pytest.raises(StageError, match=r"no database for `schema` \.\./library"):
        score("SELECT 1", "SELECT 1", {"schema": "../library"})


def test_no_more_rows_are_read_than_decide(score: Scorer) -> None:
    """Half a million rows of a megabyte: the fifth says that it is not the same result."""
    began = time.process_time()
    assert score(f"{ENDLESS} SELECT hex(zeroblob(400000)) FROM n", "SELECT title FROM books", LIBRARY) == (0, "")
    assert time.process_time() - began < 2
    with pytest.raises(StageError, match="more than 512 MiB of memory"):  # a reference is read whole
        score("SELECT 1", f"{ENDLESS} SELECT hex(zeroblob(400000)) FROM n", LIBRARY)


def test_a_query_of_slow_steps_ends_too(score: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_execution, "SECONDS", 0.5)
    slow = "instr(printf('%.*c', 200000 + i, 'a'), printf('%.*c', 100000, 'a') || 'b')"  # 0.3 s, in one step
    verdict = score(f"{ENDLESS} SELECT sum({slow}) FROM n", "SELECT 1", LIBRARY)
    assert verdict.score == 0 and verdict.error


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("ATTACH DATABASE 'FOLDER/other.db' AS other; CREATE TABLE other.t (a);", "not authorized"),
        ("CREATE TABLE t (a); VACUUM INTO 'FOLDER/other.db';", "authorization denied"),
        ("SELECT load_extension('FOLDER/other.so');", "not authorized"),
        (f"CREATE TABLE t (a); INSERT INTO t {ENDLESS} SELECT i FROM n;", "."),  # which bound is first does not matter
        ("CREATE TABLE t (a); INSERT INTO u VALUES (1);", "no such table"),
        (".read /etc/passwd", "syntax error"),
    ],
)
def test_a_database_of_a_stranger(tmp_path: Path, script: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_execution, "SCRIPT_SECONDS", 0.5)
    (tmp_path / "library.sql").write_text(script.replace("FOLDER", str(tmp_path)))
    score = make_scorer({"kind": "sql-execution", "schema_column": "schema"}, tmp_path)
    with pytest.raises(StageError, match=f"library.sql cannot be made(.|\n)*{re.escape(reason)}"):
        score("SELECT 1", "SELECT 1", LIBRARY)
    assert [path.name for path in tmp_path.iterdir()] == ["library.sql"]


def test_exact_match_strips_white_space_and_nothing_else() -> None:
    score = make_scorer({"kind": "exact-match"}, None)
    assert score(" blue\n", "blue", {}).score == 1
    assert score("Blue", "blue", {}).score == 0


def test_an_unknown_scorer_is_no_silent_default() -> None:
    with pytest.raises(ValueError, match="no scorer sql-execution"):
        make_scorer({"kind": "sql-execution", "schema_column": "schema"}, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It costs 1,234.50 in all.", "1234.50"),
        ("3 and then -7", "-7"),
        ("3-5", "5"),  # a range, no sign
        ("a minus of print: −2", "-2"),
        ("$ .5", "0.5"),
        ("1,2345", "2345"),  # no thousands
        ("12,345,678", "12345678"),
        ("6.02e23 or 1.5E-3", "0.0015"),
        ("v1.2.3", "3"),
        ("+4.", "4"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_is_found(text: str, expected: str | None) -> None:
    number = NumberScorer(NUMBER, absolute=0, relative=0).find(text)
    assert number == (None if expected is None else Decimal(expected))


def number(**changes: Any) -> Scorer:
    (scorer,) = Evaluate.model_validate({"scorers": [{"kind": "number", **changes}]}).scorers
    return make_scorer(scorer.params(), None)


def test_numbers_are_equal_or_within_the_tolerance() -> None:
    exact = number()
    assert exact("the answer is 42", "#### 42.0", {}) == (1, "")
    assert exact("9007199254740993", "9007199254740992", {}).score == 0  # equal as floats
    assert exact("I do not know", "42", {}) == (0, "no number in the answer")
    assert exact("42", "unknown", {}) == (0, "no number in the reference")
    near = number(absolute=0.02)
    assert [near(text, "1.00", {}).score for text in ("1.02", "0.98", "1.021")] == [1, 1, 0]
    share = number(relative=0.01)
    assert [share(text, "-200", {}).score for text in ("-202", "-198", "-197.9", "200")] == [1, 1, 0, 0]
    marked = number(pattern=r"#### *(\S+)")
    assert marked("7 #### 42 and 8", "#### 42", {}).score == 1
    assert marked("#### none", "#### 42", {}) == (0, "no number in the answer")


def test_a_pattern_has_one_group() -> None:
    with pytest.raises(ValidationError, match="pattern has 0 groups"):
        number(pattern=r"\d+")
    with pytest.raises(ValidationError, match="pattern is no regular expression"):
        number(pattern="(")


@pytest.mark.parametrize("said", ["1e9999999", "-9e999999", "1e-9999999", "9" * 5000])
def test_a_number_out_of_all_range_is_wrong_and_nothing_else(said: str) -> None:
    assert number()(said, "42", {}).score == 0
    assert number(relative=0.1)(said, "42", {}).score == 0
    assert number()(said, said, {}).score == 1


def test_a_pattern_that_takes_for_ever_scores_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.jobs.scorers.number.SECONDS", 0.5)
    verdict = number(pattern=r"((?:\d+)+)$")("1" * 60 + "x", "1", {})
    assert verdict == (0, "to find a number with this pattern takes more than 0.5 s of processor time")


SCHEMA = {
    "type": "object",
    "required": ["city"],
    "properties": {"city": {"type": "string"}, "people": {"type": "integer", "minimum": 0}},
    "additionalProperties": False,
}


def json_scorer(folder: Path, match: str, schema: object = SCHEMA) -> Scorer:
    path = folder / "schema.json"
    path.write_text(json.dumps(schema))
    return make_scorer({"kind": "json-schema", "match": match}, path)


@pytest.mark.parametrize(
    ("answer", "valid", "equal", "error"),
    [
        ('{"city": "Rome", "people": 3}', 1, 1, ""),
        (' {"people": 3.0, "city": "Rome"}\n', 1, 1, ""),  # 3.0 is an integer of JSON Schema, and equals 3
        ('{"city": "Rome", "people": 4}', 1, 0, ""),
        ('{"city": "Rome"}', 1, 0, ""),
        ('{"people": 3}', 0, 0, "'city' is a required property"),
        ('{"city": 5, "people": 3}', 0, 0, "$.city: 5 is not of type 'string'"),
        ('{"city": "Rome", "people": true}', 0, 0, "$.people: True is not of type 'integer'"),
        ('Sure! {"city": "Rome"}', 0, 0, "no JSON"),
        ('```json\n{"city": "Rome"}\n```', 0, 0, "no JSON"),
        ('{"city": "Rome", "city": "Oslo"}', 0, 0, "twice"),
        ('{"city": "Rome", "people": NaN}', 0, 0, "NaN is no JSON"),
        ("[" * 100_000, 0, 0, "no JSON"),
        ("", 0, 0, "no JSON"),
    ],
)
def test_json_is_valid_and_equal(tmp_path: Path, answer: str, valid: int, equal: int, error: str) -> None:
    reference = '{"city": "Rome", "people": 3}'
    for match, expected in (("valid", valid), ("equal", equal)):
        verdict = json_scorer(tmp_path, match)(answer, reference, {})
        assert verdict.score == expected
        assert error in verdict.error


def test_true_is_not_1_in_json(tmp_path: Path) -> None:
    equal = json_scorer(tmp_path, "equal", schema=True)
    assert equal("[1]", "[1.0]", {}).score == 1
    assert equal("[true]", "[1]", {}).score == 0
    assert equal("[1, 2]", "[2, 1]", {}).score == 0


def test_a_schema_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="is not a JSON schema"):
        json_scorer(tmp_path, "valid", schema={"type": "objekt"})


@pytest.mark.parametrize("address", ["http://127.0.0.1:PORT/schema.json", "FOLDER/other.json", "other.json"])
def test_a_schema_fetches_nothing(tmp_path: Path, address: str) -> None:
    """jsonschema opens whatever `$ref` names, files and addresses, unless it is told not to."""
    (tmp_path / "other.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = address.replace("PORT", str(server.getsockname()[1])).replace("FOLDER", tmp_path.as_uri())
        score = json_scorer(tmp_path, "valid", schema={"$ref": address})
        with pytest.raises(StageError, match="no other file or address is read"):
            score("{}", "{}", {})
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_a_schema_may_refer_to_itself_and_to_its_draft(tmp_path: Path) -> None:
    tree = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    assert json_scorer(tmp_path, "valid", schema=tree)("[[], [[]]]", "", {}).score == 1
    draft = json_scorer(tmp_path, "valid", schema={"$ref": "https://json-schema.org/draft/2020-12/schema"})
    assert [draft(text, "", {}).score for text in ('{"type": "object"}', '{"type": 5}')] == [1, 0]


@pytest.mark.parametrize(
    ("schema", "answer", "error"),
    [
        ({"type": "string", "pattern": "^(a+)+$"}, json.dumps("a" * 60 + "!"), "more than 0.5 s of processor time"),
        ({"$ref": "#"}, "1", "refers to itself"),
        ({"items": {"$ref": "#"}}, "[" * 900 + "]" * 900, "nested too deeply"),
        (True, "9" * 5000, "no JSON"),
    ],
)
def test_an_answer_that_takes_too_much_scores_0(
    tmp_path: Path, schema: object, answer: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.jobs.scorers.json_schema.SECONDS", 0.5)
    verdict = json_scorer(tmp_path, "valid", schema=schema)(answer, "", {})
    assert verdict.score == 0 and error in verdict.error
