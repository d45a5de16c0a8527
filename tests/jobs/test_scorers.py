"""Execution accuracy in sqlite3 and exact match: what counts, what cannot cheat, what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tasks.jobs.scorers import Scorer, make_scorer
from tasks.jobs.scorers.sql_execution import orders
from tasks.runtime.errors import StageError

SCRIPT = """
CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT, pages INTEGER, price REAL);
INSERT INTO books VALUES (1, 'Winter', 100, 1.5), (2, 'River', 300, 2.25), (3, 'Winter', 200, 4.0);
"""
LIBRARY = {"schema": "library"}


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


def test_exact_match_strips_white_space_and_nothing_else() -> None:
    score = make_scorer({"kind": "exact-match"}, None)
    assert score(" blue\n", "blue", {}).score == 1
    assert score("Blue", "blue", {}).score == 0


def test_an_unknown_scorer_is_no_silent_default() -> None:
    with pytest.raises(ValueError, match="no scorer sql-execution"):
        make_scorer({"kind": "sql-execution", "schema_column": "schema"}, None)
