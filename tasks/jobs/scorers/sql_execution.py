"""Answer and reference return the same rows from sqlite3 (execution accuracy, as in Spider: Yu et al. 2018).

A model writes the query, a stranger may have written the database. Both run in memory: an authorizer lets queries read
and nothing else, and lets a SCHEMA.sql open no file; steps, processor time, memory, and what is read are bounded.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tasks.jobs.scorers import Verdict
from tasks.runtime.bounds import OverBounds, bounds
from tasks.runtime.process.errors import StageError

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FILES = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH}  # a SCHEMA.sql makes tables in memory; VACUUM INTO attaches, too
STEPS = 5_000_000  # virtual machine instructions per query, about 0.2 s; time would depend on the machine
TICK = 100  # steps between two looks: one alone may search a megabyte for half of it, 7 s
SECONDS, MIB = 10.0, 512  # processor time and memory of a query; STEPS take 0.2 s unless they are slow ones
SCRIPT_SECONDS, SCRIPT_MIB = 300.0, 8192  # of a SCHEMA.sql: a gigabyte of rows takes some 60 s and 1.5 GiB
BYTES = 1_000_000  # longest string or blob
QUERY_BYTES = 100_000  # longest query
PATTERN_BYTES = 1_000  # longest pattern of LIKE and GLOB, whose time is its length times that of the text
QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]")
INNERMOST = re.compile(r"\([^()]*\)")
# Warning: two statements; ValueError: a zero byte, no query
REFUSALS = (sqlite3.Error, sqlite3.Warning, ValueError, OverBounds)


class Result(NamedTuple):
    """What a query returned."""

    columns: int
    rows: list[tuple[Any, ...]]


class SqlExecutionScorer:
    """Scores SQL against the databases of a folder, one SCHEMA.sql each, read-only and in memory."""

    def __init__(self, folder: Path, *, column: str) -> None:
        self._scripts = {path.stem: path for path in folder.glob("*.sql")}
        self._column = column
        self._open: dict[str, sqlite3.Connection] = {}
        self._expected: dict[tuple[str, str], Result] = {}

    def __call__(self, answer: str, reference: str, columns: Mapping[str, Any]) -> Verdict:
        """1 where both return the same rows; order counts only where the reference's outermost query orders.

        Raises:
            StageError: No such database; the reference itself does not run.
        """
        schema = str(columns.get(self._column))
        database = self._database(schema)
        if (schema, reference) not in self._expected:
            try:
                self._expected[schema, reference] = execute(database, reference)
            except REFUSALS as error:
                raise _bad_reference(reference, schema, error) from None
        expected = self._expected[schema, reference]
        try:
            got = execute(database, answer, most=len(expected.rows) + 1)
        except REFUSALS as error:
            return Verdict(0.0, str(error))
        if got.columns != expected.columns:
            return Verdict(0.0)
        if orders(reference):
            return Verdict(float(got.rows == expected.rows))
        return Verdict(float(Counter(got.rows) == Counter(expected.rows)))

    def _database(self, schema: str) -> sqlite3.Connection:
        if schema not in self._open:
            if schema not in self._scripts:
                raise _no_database(schema, self._column, sorted(self._scripts))
            self._open[schema] = _made(self._scripts[schema])
        return self._open[schema]


def _made(script: Path) -> sqlite3.Connection:
    """The database of a script, in memory; what comes after only reads.

    Raises:
        StageError: The script does not run, opens a file, or takes more than any database needs.
    """
    database = sqlite3.connect(":memory:")
    database.execute("PRAGMA temp_store = MEMORY")  # what a query sorts counts as memory, and fills no disk
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action in FILES else sqlite3.SQLITE_OK)
    # Time is looked at there: a loop within sqlite3 does not come back to Python by itself.
    database.set_progress_handler(lambda: None, 100_000)
    try:
        with bounds(seconds=SCRIPT_SECONDS, mib=SCRIPT_MIB):
            database.executescript(script.read_text(encoding="utf-8"))
    except (*REFUSALS, OSError) as error:
        raise _bad_script(script, error) from None
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, QUERY_BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, PATTERN_BYTES)
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)
    return database


def orders(query: str) -> bool:
    """True where the outermost query has an ORDER BY: outside quotes and parentheses."""
    text, removed = QUOTED.sub(" ", query), 1
    while removed:
        text, removed = INNERMOST.subn(" ", text)
    return re.search(r"\border\s+by\b", text, re.IGNORECASE) is not None


def execute(database: sqlite3.Connection, query: str, *, most: int | None = None) -> Result:
    """Rows of one query, floats rounded to 6 places: AVG and SUM / COUNT differ behind them.

    Args:
        database: Where it runs.
        query: SQL.
        most: Rows that are read of its result; all.

    Raises:
        sqlite3.Error, sqlite3.Warning, ValueError: It does not run, writes, is not a query, or takes more than STEPS.
        OverBounds: It takes more processor time or memory than any query needs.
    """
    ticks = iter(range(STEPS // TICK))
    database.set_progress_handler(lambda: next(ticks, None) is None, TICK)
    with bounds(seconds=SECONDS, mib=MIB), contextlib.closing(database.execute(query)) as cursor:
        if cursor.description is None:
            raise ValueError("not a query")
        read = islice(cursor, most)
        rows = [tuple(round(value, 6) if isinstance(value, float) else value for value in row) for row in read]
        return Result(len(cursor.description), rows)


def _bad_reference(reference: str, schema: str, error: BaseException) -> StageError:
    return StageError.of(
        what="a reference answer does not run",
        where=f"database {schema}: {reference}",
        why=f"sqlite3 says: {error}",
        next="correct that row of the data, or its database",
    )


def _bad_script(script: Path, error: BaseException) -> StageError:
    return StageError.of(
        what=f"the database {script.name} cannot be made",
        where=str(script),
        why=f"sqlite3 says: {error}",
        next="correct the file: CREATE TABLE and INSERT, as `sqlite3 FILE .dump` writes them; it opens no other file",
    )


def _no_database(schema: str, column: str, names: list[str]) -> StageError:
    return StageError.of(
        what=f"no database for `{column}` {schema}",
        where="evaluate.scorers, kind sql-execution: databases",
        why=f"the folder has {', '.join(names) or 'no .sql file'}",
        next=f"add {schema}.sql, or correct column `{column}` of the data",
    )
