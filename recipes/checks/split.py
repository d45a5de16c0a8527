"""The split that prepare will make, less rows that turn out too long: what is known of each side, without its texts."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from recipes.checks.power import Scored
from recipes.data.rows import SIDES, Row, Side, drawn, side
from recipes.data.schema import Data
from recipes.data.turns import Message
from recipes.data.wrong import Wrong


@dataclass(kw_only=True)
class SideRows:
    """What is known of the rows of a side; `len()` says how many there are.

    Attributes:
        chats: By domain and group, how many rows are no plain text; nothing of train, which nothing is scored on.
        tokens: By group, at most so many tokens; nothing of train.
        domains: How many rows each domain has.
        bounds: At most so many tokens, of each row.
    """

    chats: dict[str, Counter[int]] = field(default_factory=dict[str, Counter[int]])
    tokens: Counter[int] = field(default_factory=Counter[int])
    domains: Counter[str] = field(default_factory=Counter[str])
    bounds: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def by_task(self) -> Scored:
        """Rows that have a task score: those with a prompt."""
        groups: Counter[int] = Counter()
        for counts in self.chats.values():
            groups.update(counts)
        return Scored.of(groups.values())

    @property
    def by_tokens(self) -> Scored:
        """What a loss is the mean of: tokens, which are bounded here; so its groups are about right."""
        return Scored.of(self.tokens.values())

    @property
    def by_domain(self) -> dict[str, Scored]:
        """Of the rows with a prompt, by domain."""
        return {domain: Scored.of(counts.values()) for domain, counts in self.chats.items()}


@dataclass(kw_only=True)
class Sides:
    """Distinct rows on the sides of the split.

    Attributes:
        rows: By side.
        duplicates: Rows that equal an earlier one.
        not_drawn: Train rows that the weight of their source leaves out.
        torn: Equal rows of two groups, by line.
        groups: How many groups there are on all sides; counting ends at the number of sides.
    """

    rows: dict[Side, SideRows]
    duplicates: int
    not_drawn: int
    torn: Wrong
    groups: int


class Split:
    """Takes one row after the other; some 150 bytes of each stay, 400 where a column keeps rows together."""

    def __init__(self, data: Data) -> None:
        """No rows yet.

        Args:
            data: Of the recipe.
        """
        self._data, self._group, self._domain = data, data.group_column, data.domain_column
        self._names: dict[int, tuple[str, str] | None] = {}  # where and group of the first row of a name
        self._sides, self._is_chat = array("b"), array("b")
        self._domains: dict[str, int] = {}
        self._own_domain, self._bounds, self._groups = array("q"), array("q"), array("q")
        self._duplicates = self._not_drawn = 0
        self._torn = Wrong()

    def add(self, row: Row) -> Side | None:
        """The side of the next row; None where it equals an earlier one, or its weight leaves it out."""
        name, group = int(row.name, 16), row.group(self._group)
        if name in self._names:
            self._duplicates += 1
            self._note_torn(self._names[name], row, group)
            return None
        self._names[name] = (row.where, group) if self._group else None  # equal rows have equal questions
        data = self._data
        on = side(group, salt=data.salt, dev=data.dev, test=data.test)
        if on == "train" and not drawn(row.name, weight=row.origin.weight, salt=data.salt):
            self._not_drawn += 1
            return None
        self._sides.append(SIDES.index(on))
        self._is_chat.append(not row.is_text)
        self._own_domain.append(self._domains.setdefault(row.domain(self._domain), len(self._domains)))
        self._bounds.append(token_bound(row.messages))
        self._groups.append(hash(group))
        return on

    def sides(self, *, removed: Sequence[bool] | None = None) -> Sides:
        """What there is on each side.

        Args:
            removed: Of every row that was kept, in their order, whether it goes after all.
        """
        rows: dict[Side, SideRows] = {name: SideRows() for name in SIDES}
        domains = list(self._domains)
        for number, place in enumerate(self._sides):
            if removed is not None and removed[number]:
                continue
            own = rows[SIDES[place]]
            domain, group = domains[self._own_domain[number]], self._groups[number]
            own.bounds.append(self._bounds[number])
            own.domains[domain] += 1
            if own is rows["train"]:
                continue
            own.tokens[group] += min(self._bounds[number], self._data.max_length)  # longer ones are left out or cut
            if self._is_chat[number]:
                own.chats.setdefault(domain, Counter())[group] += 1
        return Sides(
            rows=rows,
            duplicates=self._duplicates,
            not_drawn=self._not_drawn,
            torn=self._torn,
            groups=_count(self._groups, most=len(SIDES)),
        )

    def _note_torn(self, first: tuple[str, str] | None, row: Row, group: str) -> None:
        if first is not None and first[1] != group:
            self._torn.add(f"{first[0]} ({first[1]}) and {row.where} ({group})")


def _count(groups: Iterable[int], *, most: int) -> int:
    """Different ones, up to `most`."""
    seen: set[int] = set()
    for group in groups:
        seen.add(group)
        if len(seen) == most:
            break
    return len(seen)


def split_rows(rows: Iterable[Row], data: Data) -> Sides:
    """The sides of rows that are in memory."""
    split = Split(data)
    for row in rows:
        split.add(row)
    return split.sides()


def token_bound(messages: Sequence[Message]) -> int:
    """An upper bound of the turns' tokens: one per byte, and 32 for the template around each turn."""
    calls = (json.dumps(turn["tool_calls"]) for turn in messages if turn.get("tool_calls"))
    texts = (turn.get(name) or "" for turn in messages for name in ("content", "reasoning_content"))
    return 32 * len(messages) + sum(len(text.encode()) for text in texts) + sum(map(len, calls))
