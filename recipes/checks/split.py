"""The split that prepare will make, counted row by row: some 200 bytes of each stay in memory, and no row."""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.data.rows import SHOWN, Row, Side, drawn, side
from recipes.data.schema import Data
from recipes.data.turns import Message


@dataclass(kw_only=True)
class SideCounts:
    """Distinct rows on one side of the split.

    Attributes:
        rows: How many.
        domains: How many of each domain.
        asked: Rows that ask something: no plain texts.
        groups: 64-bit hashes of the groups of these; not of train, where nothing asks for them.
    """

    rows: int = 0
    domains: Counter[str] = field(default_factory=Counter[str])
    asked: int = 0
    groups: set[int] = field(default_factory=set[int])

    def add(self, row: Row, *, domain: str, group: int | None) -> None:
        """One row more."""
        self.rows += 1
        self.domains[domain] += 1
        if not row.is_text:
            self.asked += 1
            if group is not None:
                self.groups.add(group)


@dataclass(frozen=True, kw_only=True)
class Torn:
    """A row that equals an earlier one of another group.

    Attributes:
        first: Number of the earlier one, from 0, over all sources.
        later: The place and group of this one.
    """

    first: int
    later: str


class Split:
    """Takes rows one after the other; less what turns out too long, it is prepare's split.

    Attributes:
        sides: Counts of each side.
        duplicates: Rows that equal an earlier one.
        not_drawn: Train rows that the weight of their source leaves out.
        torn: The first 20 equal rows of two groups.
        torn_rows: How many there are.
        largest: Bounds of the tokens of train rows, the largest ones; as many as calibration draws.
    """

    def __init__(self, data: Data, *, calibrated: int = 0) -> None:
        self._data, self._calibrated = data, calibrated
        self._group, self._domain = data.group_column, data.domain_column
        self._numbers: dict[int, int] = {}  # of the first row of each name
        self._groups = array("Q")
        self.sides: dict[Side, SideCounts] = {"train": SideCounts(), "dev": SideCounts(), "test": SideCounts()}
        self.duplicates = self.not_drawn = self.torn_rows = 0
        self.torn: list[Torn] = []
        self.largest: list[int] = []

    def add(self, row: Row) -> Side | None:
        """The side that it goes to; None for a duplicate, and for a row that its weight leaves out."""
        data, words = self._data, row.group(self._group)
        group = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")
        number = len(self._groups)
        self._groups.append(group)
        first = self._numbers.setdefault(int(row.name, 16), number)
        if first != number:
            self.duplicates += 1
            if self._groups[first] != group:
                self._tear(first, f"{row.where} ({words})")
            return None
        of_group = side(words, salt=data.salt, dev=data.dev, test=data.test)
        if of_group == "train" and not drawn(row.name, weight=row.origin.weight, salt=data.salt):
            self.not_drawn += 1
            return None
        in_train = of_group == "train"
        self.sides[of_group].add(row, domain=row.domain(self._domain), group=None if in_train else group)
        if in_train:
            self._keep_largest(token_bound(row.messages))
        return of_group

    def _tear(self, first: int, later: str) -> None:
        self.torn_rows += 1
        if self.torn_rows <= SHOWN:
            self.torn.append(Torn(first=first, later=later))

    def _keep_largest(self, bound: int) -> None:
        if len(self.largest) < self._calibrated:
            heapq.heappush(self.largest, bound)
        elif self._calibrated:
            heapq.heappushpop(self.largest, bound)


def token_bound(messages: Sequence[Message]) -> int:
    """An upper bound of the turns' tokens: one per byte, and 32 for the template around each turn."""
    calls = (json.dumps(turn["tool_calls"]) for turn in messages if turn.get("tool_calls"))
    return sum(len((turn.get("content") or "").encode()) + 32 for turn in messages) + sum(map(len, calls))
