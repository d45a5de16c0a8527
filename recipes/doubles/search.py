"""What prepare and the check of the data ask of all rows: who is almost equal to whom, who goes, what leaks."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.data.rows import SIDES, STAYS, Side
from recipes.data.turns import Message
from recipes.doubles.exchanges import Exchanges
from recipes.doubles.grams import Grams, GramWriter, compared_text
from recipes.doubles.near_duplicates import Alike, alike, not_all_compared
from recipes.problem import Problem

LEAK = 0.9  # Jaccard similarity from which a row of train is a near-twin of one of dev or test
SHOWN = 10  # leaks that are named


class Pair(NamedTuple):
    """Two rows by their number, in the order in which they were added: one that is late, and one it is like."""

    row: int
    like: int


class Leaks(NamedTuple):
    """Rows of train that are, almost or in part, in dev or test.

    Attributes:
        train: Rows of train.
        twins: Rows of train that are almost equal to a row of dev or test.
        exchanges: Rows of train that share an exchange (an answer with all turns before it) with one.
        limited: Rows that were not compared with every proposal.
    """

    train: int
    twins: list[Pair]
    exchanges: list[Pair]
    limited: int

    @property
    def rows(self) -> int:
        """How many rows of train leak."""
        return len({pair.row for pair in (*self.twins, *self.exchanges)})

    @property
    def counts(self) -> dict[str, int]:
        """For a summary."""
        return {"train": self.train, "rows": self.rows, "twins": len(self.twins), "exchanges": len(self.exchanges)}

    def words(self, where: Callable[[int], str]) -> str:
        """For a note, with the first ten of each kind.

        Args:
            where: Place of a row, by its number.
        """
        return leaks_in_words(self.counts) + not_all_compared(self.limited) + self.examples(where)

    def examples(self, where: Callable[[int], str]) -> str:
        """The first ten of each kind, a line each.

        Args:
            where: Place of a row, by its number.
        """
        named = [f"{where(pair.row)} like {where(pair.like)}" for pair in self.twins[:SHOWN]]
        named += [f"{where(pair.row)} shares with {where(pair.like)}" for pair in self.exchanges[:SHOWN]]
        return "".join(f"\n    {line}" for line in named)


class Doubles(NamedTuple):
    """What the search says of the rows, in the order in which they were added.

    Attributes:
        removed: [rows] whether a row goes.
        near: `rows`, `across_sides`, `removed`, and how many are in `train`, `dev` and `test`: rows that are almost
            equal to another.
        limited: Rows that were not compared with every proposal.
        leaks: Of the rows that stay.
    """

    removed: NDArray[np.bool_]
    near: dict[str, int]
    limited: int
    leaks: Leaks

    def words(self, *, jaccard: float, mode: Literal["count", "remove"]) -> str:
        """Of the near-duplicates, for a note."""
        near = self.near
        text = (
            f"{near['rows']} rows share {jaccard:g} or more of their 5-grams with another: {near['train']} in train, "
            f"{near['dev']} in dev, {near['test']} in test; {near['across_sides']} of them resemble a row of another "
            "side"
        )
        if mode == "remove":
            text += f"; {near['removed']} removed from train and dev, none from test"
        elif near["rows"]:
            text += "; data.near_duplicates: remove leaves them out of train and dev"
        return text + not_all_compared(self.limited)


class DoubleSearch:
    """Takes rows one after the other, all of them distinct; some 300 bytes of each stay in memory."""

    def __init__(self, folder: Path) -> None:
        """Begin.

        Args:
            folder: For a file that grows to about the size of the rows.
        """
        self._grams = GramWriter(folder / "grams")
        self._exchanges = Exchanges()
        self._names, self._sides = array("Q"), array("b")

    def add(
        self, name: str, side: Side, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Take the next row.

        Args:
            name: Its 16 hex digits.
            side: Its side of the split.
            turns: In the form of recipes/data/turns.py.
            tools: Of the row.
        """
        self._names.append(int(name, 16))
        self._sides.append(STAYS.index(side))
        self._grams.add(compared_text(turns))
        self._exchanges.add(turns, tools)

    def find(self, *, mode: Literal["count", "remove"], jaccard: float) -> Doubles:
        """Near-duplicates, who of them goes, and the leaks among those that stay.

        Args:
            mode: data.near_duplicates: `remove` takes near-duplicates out of train and dev.
            jaccard: data.near_duplicate_jaccard.
        """
        sides = np.asarray(self._sides, np.int8)
        order = np.lexsort((np.asarray(self._names, np.uint64), sides))
        grams = self._grams.finish()
        try:
            return self._find(sides, order, grams, mode=mode, jaccard=jaccard)
        finally:
            grams.close()

    def _find(
        self, sides: NDArray[np.int8], order: NDArray[np.int64], grams: Grams, *, mode: str, jaccard: float
    ) -> Doubles:
        test, held, train = sides == 0, sides < 2, sides == 2
        removes = mode == "remove"
        near = alike(order, grams, jaccard=jaccard, stay=test if removes else held)
        removed = np.zeros(len(sides), bool)
        if removes:
            removed[[row for row, _ in near.pairs]] = True
            removed &= ~test
        if removes and jaccard <= LEAK:  # no row of train is left that is like one of dev or test
            twins = Alike([], near.limited)
        elif not removes and jaccard == LEAK:
            twins = near
        else:
            twins = alike(order[~removed[order]], grams, jaccard=LEAK, stay=held)
        leaks = Leaks(
            train=int((train & ~removed).sum()),
            twins=[Pair(row, like) for row, like in twins.pairs if train[row] and held[like]],
            exchanges=[Pair(*pair) for pair in self._exchanges.shared(train & ~removed, held & ~removed)],
            limited=twins.limited,
        )
        by_side = Counter(STAYS[int(sides[row])] for row, _ in near.pairs)
        counts = {
            "rows": len(near.pairs),
            "across_sides": sum(bool(sides[row] != sides[like]) for row, like in near.pairs),
            "removed": int(removed.sum()),
        } | {side: by_side[side] for side in SIDES}
        return Doubles(removed, counts, near.limited, leaks)


def leaks_in_words(counts: Mapping[str, int]) -> str:
    """`3 of 900 train rows are in dev or test ...`."""
    return (
        f"{counts['rows']} of {counts['train']} train rows are in dev or test, almost or in part: {counts['twins']} "
        f"near-twins (Jaccard >= {LEAK:g}), {counts['exchanges']} share an answer with all turns before it"
    )


def leak_problem(counts: Mapping[str, int], *, most: float, examples: str, group: str | None) -> Problem | None:
    """What is wrong where more of train leaks than is allowed; None where it does not.

    Args:
        counts: Leaks.counts.
        most: calibrate.max_near_duplicates.
        examples: Which rows.
        group: The column that keeps rows together; None: the first question.
    """
    if counts["rows"] <= most * counts["train"]:
        return None
    remedies: list[str] = []
    if counts["twins"]:
        remedies.append(
            "set data.near_duplicates: remove, or name the column that keeps such rows together: data.group"
        )
    if counts["exchanges"] and group:
        remedies.append(
            f"give rows that share turns one value of `{group}`, or leave it out: rows with one first question then "
            "stay on one side"
        )
    return Problem(
        what=f"{leaks_in_words(counts)}.",
        where="calibrate.max_near_duplicates",
        why=f"Dev and test would measure what was trained; {most:g} of train is allowed, "
        f"{math.floor(most * counts['train'])} rows.{examples}",
        next=f"{'; '.join(remedies).capitalize()}; calibrate.max_near_duplicates allows more.",
    )
