"""Rows added, removed and edited since they were read last, by domain.

A row is named by its turns and tools, so nothing says which old row a new one replaces. Counted as edited are

* a row with the same turns and tools, and another domain or other columns;
* of the rows that left and the rows that came within one group (data.group) and domain, as many as make pairs. Where
  that column is unique to a row (an id) this is exact; where it holds many rows together it says at most how many.

Without data.group the group is the first question, so another answer to it is an edit. Equal rows are one row; the
order of rows and the names and formats of files do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.data.origin import Origin
from recipes.data.rows import Row, content_hash, read_origin
from recipes.data.schema import Data

NAMED = 5  # domains that a sentence names; the rest is counted


class KnownRow(NamedTuple):
    """What is kept of a row beside its name: group, domain, and a digest of its other columns."""

    group: str
    domain: str
    columns: str


Rows = Mapping[str, KnownRow]  # by name


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Domain -> rows; one with no name where the recipe has no domains."""

    added: Mapping[str, int]
    removed: Mapping[str, int]
    edited: Mapping[str, int]

    def __bool__(self) -> bool:
        return any((self.added, self.removed, self.edited))

    def __str__(self) -> str:
        """`12 rows added, 3 edited (join: 10 added; filter: 2 added, 3 edited)`."""
        domains = sorted(
            {*self.added, *self.removed, *self.edited}, key=lambda domain: (-self._touched(domain), domain)
        )
        total = f"rows {_in_words({kind: sum(counts.values()) for kind, counts in asdict(self).items()})}"
        if domains in ([], [""]):
            return total
        parts = [f"{domain or 'no domain'}: {_in_words(self.of(domain))}" for domain in domains[:NAMED]]
        parts += [f"and {len(domains) - NAMED} domains more"] if len(domains) > NAMED else []
        return f"{total} ({'; '.join(parts)})"

    def of(self, domain: str) -> dict[str, int]:
        """Kind of change -> rows of a domain."""
        return {kind: counts.get(domain, 0) for kind, counts in asdict(self).items()}

    def _touched(self, domain: str) -> int:
        return sum(self.of(domain).values())


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count) or "unchanged"


def rows_of(origins: Iterable[Origin], data: Data) -> dict[str, KnownRow]:
    """The good rows of all sources; malformed ones are refused elsewhere (recipes/checks/rows.py)."""
    rows: dict[str, KnownRow] = {}
    for row in (row for origin in origins for row in read_origin(origin).rows):
        name = content_hash(row.messages, row.tools)[:16]  # not Row.name: another domain is an edit of the same row
        if name not in rows:  # the first of equal rows stays, as in prepare
            rows[name] = _known(row, data)
    return rows


def _known(row: Row, data: Data) -> KnownRow:
    columns = json.dumps(row.columns, sort_keys=True, ensure_ascii=False, default=str)
    return KnownRow(
        group=row.group(data.group_column),
        domain=row.domain(data.domain_column),
        columns=hashlib.sha256(columns.encode(errors="surrogatepass")).hexdigest()[:16],
    )


def count(before: Rows, now: Rows) -> Changes:
    """What happened to the rows."""
    gone = Counter((before[name].group, before[name].domain) for name in before.keys() - now.keys())
    came = Counter((now[name].group, now[name].domain) for name in now.keys() - before.keys())
    pairs = gone & came
    stayed = before.keys() & now.keys()
    touched = Counter(now[name].domain for name in stayed if before[name][1:] != now[name][1:])
    return Changes(
        added=dict(_by_domain(came - pairs)),
        removed=dict(_by_domain(gone - pairs)),
        edited=dict(_by_domain(pairs) + touched),
    )


def _by_domain(by_group: Mapping[tuple[str, str], int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (_, domain), rows in by_group.items():
        counts[domain] += rows
    return counts


def save(rows: Rows, path: Path) -> None:
    """Write rows as parquet."""
    table: dict[str, Any] = {"row": list(rows)}
    table |= {name: [getattr(row, name) for row in rows.values()] for name in KnownRow._fields}
    pq.write_table(pa.table(table, schema=pa.schema([(name, pa.string()) for name in table])), path)


def load(path: Path) -> dict[str, KnownRow]:
    """What `save` wrote."""
    table = pq.read_table(path)
    columns = (table[name].to_pylist() for name in KnownRow._fields)
    return dict(zip(table["row"].to_pylist(), map(KnownRow._make, zip(*columns, strict=True)), strict=True))
