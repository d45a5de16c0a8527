"""Writes the quickstart's domain data: questions about three small databases, each answered by one SQL query.

    python recipes/quickstart/make_data.py

Reads domain.yaml; writes data/databases/<schema>.sql (tables and rows, for sqlite3) and data/sql.jsonl. A
question does not carry its schema: the tables and what their columns are called are what the model has to
learn. All phrasings of one query are one group, so a split by group puts no query on two sides.
"""

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).parent
SEED = 11
QUERIES = 100  # of each family, in each schema
PHRASINGS = 2  # of each query
ROWS = (240, 240, 600)  # of each table
YEARS = range(2019, 2025)
# For each slot that stands for a word of SQL: the words, and how a question says them.
WORDS = {
    "sign": {">": "above", "<": "below"},
    "order": {"desc": "highest", "asc": "lowest"},
    "function": {"avg": "average", "sum": "total", "max": "maximum"},
}
ANY = ("label", "category", "number", "date")


class Column(NamedTuple):
    """A column: its name in questions, its kind (label, category, number or date) and its values."""

    name: str
    phrase: str
    kind: str
    values: list[str] | range


class Table(NamedTuple):
    """A table; beside its columns it has an id, and the third table of a schema refers to the first two."""

    name: str
    columns: list[Column]

    @property
    def key(self) -> str:
        """The third table's column that refers to this table."""
        return self.name.removesuffix("s") + "_id"


class Piece(NamedTuple):
    """A part of a query, and the ways to say it."""

    sql: str
    wordings: tuple[str, ...]


def read_column(name: str, spec: list[str], names: dict[str, list[str]]) -> Column:
    """Returns the column that one line of domain.yaml describes."""
    phrase, values = spec
    if values in names:
        first, last = (half.split() for half in names[values])
        return Column(name, phrase, "label", [f"{a} {b}" for a in first for b in last])
    if values == "date":
        start, end = date(YEARS[0], 1, 1), date(YEARS[-1], 12, 31)
        days = [str(start + timedelta(n)) for n in range((end - start).days + 1)]
        return Column(name, phrase, "date", days)
    if ".." in values:
        low, high = map(int, values.split(".."))
        return Column(name, phrase, "number", range(low, high + 1))
    return Column(name, phrase, "category", values.split())


def database_sql(tables: list[Table], rng: random.Random) -> str:
    """Returns the statements that make one database and fill it."""
    lines = []
    for table, count in zip(tables, ROWS, strict=True):
        keys = [entity.key for entity in tables[:2]] if table is tables[2] else []
        typed = [f"{c.name} {'INTEGER' if c.kind == 'number' else 'TEXT'}" for c in table.columns]
        lines.append(f"CREATE TABLE {table.name} ({', '.join(['id INTEGER PRIMARY KEY', *keys, *typed])});")
        for row in range(1, count + 1):  # the last tenth of the entities has no events
            references = [rng.randint(1, size * 9 // 10) for size in ROWS[:2]] if keys else []
            values = (row, *references, *(rng.choice(c.values) for c in table.columns))
            lines.append(f"INSERT INTO {table.name} VALUES {values};")
    return "\n".join(lines) + "\n"


class Draw:
    """One query being made: draws for each slot a piece, and uses no column twice."""

    def __init__(self, tables: list[Table], rng: random.Random) -> None:
        """Draws the tables that the query is about."""
        self.rng = rng
        self.entity, self.event, self.table = rng.choice(tables[:2]), tables[2], rng.choice(tables)
        self.unused = {table.name: rng.sample(table.columns, len(table.columns)) for table in tables}

    def take(self, table: Table, *kinds: str) -> Column:
        """Draws an unused column of one of these kinds; raises LookupError where there is none."""
        for column in self.unused[table.name]:
            if column.kind in kinds:
                self.unused[table.name].remove(column)
                return column
        raise LookupError(f"{table.name} has no further column of kind {kinds}")

    def condition(self, table: Table) -> Piece:
        """Draws a condition on one column."""
        column = self.take(table, "category", "number")
        if column.kind == "category":
            value = self.rng.choice(column.values)
            sayings = (f"with {column.phrase} {value}", f"whose {column.phrase} is {value}")
            return Piece(f"{column.name} = '{value}'", sayings)
        margin = len(column.values) // 8  # so that neither side of the value is nearly empty
        value = self.rng.choice(column.values[margin:-margin])
        sign, (word,) = self.piece("sign", table)
        sayings = (f"with {column.phrase} {word} {value}", f"whose {column.phrase} is {word} {value}")
        return Piece(f"{column.name} {sign} {value}", sayings)

    def piece(self, slot: str, over: Table) -> Piece:
        """Draws what stands in a slot."""
        plain = {
            "table": self.table.name,
            "entity": self.entity.name,
            "event": self.event.name,
            "key": self.entity.key,
            "few": self.rng.randint(2, 12),
            "many": self.rng.randint(3, 60),
            "year": self.rng.choice(YEARS),
        }
        if slot in plain:
            return Piece(str(plain[slot]), (str(plain[slot]),))
        if slot in WORDS:
            sql, word = self.rng.choice(list(WORDS[slot].items()))
            return Piece(sql, (word,))
        if slot.startswith("event_"):
            return self.piece(slot.removeprefix("event_"), self.event)
        if slot.startswith("where"):
            return self.condition(over)
        if slot in ("prefix", "suffix"):
            (label,) = (column for column in over.columns if column.kind == "label")
            word = self.rng.choice(label.values).split()[slot == "suffix"]
            return Piece(word, (word,))
        column = self.take(over, *(ANY if slot == "column" else (slot,)))
        return Piece(column.name, (column.phrase,))


def make_query(template: dict[str, Any], draw: Draw) -> tuple[str, list[str]]:
    """Returns a query and its questions, each worded from another template."""
    over = draw.entity if "{entity}" in template["sql"] else draw.table
    slots = dict.fromkeys(slot for _, slot, _, _ in Formatter().parse(template["sql"]) if slot)
    pieces = {slot: draw.piece(slot, over) for slot in slots}
    sql = template["sql"].format(**{slot: piece.sql for slot, piece in pieces.items()})
    asks = draw.rng.sample(template["ask"], PHRASINGS)
    return sql, [ask.format(**{s: draw.rng.choice(p.wordings) for s, p in pieces.items()}) for ask in asks]


def questions_about(
    tables: list[Table], families: dict[str, list], connection: sqlite3.Connection, rng: random.Random
) -> Iterator[tuple[str, str, str]]:
    """Yields (family, question, query), leaving out a query whose answer is empty or nothing but 0."""
    done = set[str]()
    for family, templates in families.items():
        wanted = len(done) + QUERIES
        while len(done) < wanted:
            try:
                sql, questions = make_query(rng.choice(templates), Draw(tables, rng))
            except LookupError:  # a table without a date, say
                continue
            if sql in done or not any(any(row) for row in connection.execute(sql)):
                continue
            done.add(sql)
            yield from ((family, question, sql) for question in questions)


def main() -> None:
    """Writes the databases and the questions."""
    domain = yaml.safe_load((HERE / "domain.yaml").read_text("utf-8"))
    (HERE / "data/databases").mkdir(parents=True, exist_ok=True)
    rows = []
    for schema, spec in domain["schemas"].items():
        rng = random.Random(f"{SEED}:{schema}")
        tables = [
            Table(table, [read_column(name, column, domain["names"]) for name, column in columns.items()])
            for table, columns in spec.items()
        ]
        statements = database_sql(tables, rng)
        (HERE / f"data/databases/{schema}.sql").write_text(statements, "utf-8")
        connection = sqlite3.connect(":memory:")
        connection.executescript(statements)
        for family, question, sql in questions_about(tables, domain["families"], connection, rng):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": sql}]
            group = f"{schema}-{family}-{hashlib.sha256(sql.encode()).hexdigest()[:12]}"
            rows.append({"messages": turns, "family": family, "schema": schema, "group": group})
    (HERE / "data/sql.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"data/sql.jsonl: {len(rows)} rows, {len({row['group'] for row in rows})} groups")


if __name__ == "__main__":
    main()
