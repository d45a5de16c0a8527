"""Rows that are almost equal to another row: MinHash (datasketch) proposes, the exact Jaccard similarity decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recipes.data.rows import Side
from recipes.data.turns import Message

GRAM = 5  # words
PERMUTATIONS = 128
FOUND = 0.8  # least share of the pairs just at the limit that MinHash has to propose
COMPARED = (
    100  # proposals per row that are compared exactly: rows from one form would else cost the square of their number
)


class NearDuplicate(NamedTuple):
    """A row and the row before it, in the order test, dev, train, that it is almost equal to."""

    row: str
    like: str


class NearDuplicates(NamedTuple):
    """The pairs, and how many rows had more than 100 proposals, of which the first 100 were compared."""

    pairs: list[NearDuplicate]
    limited: int


def near_duplicates(
    rows: Mapping[str, Sequence[Message]], sides: Mapping[str, Side], *, jaccard: float
) -> NearDuplicates:
    """Rows whose set of word 5-grams has a Jaccard similarity of `jaccard` or more with that of an earlier row.

    Rows come in the order test, dev, train, and by name within a side. With a row of dev or train that is almost equal
    to an earlier one later rows are not compared: only with rows that would stay.

    Args:
        rows: Turns by name.
        sides: Side of each.
        jaccard: The limit.

    Source: Broder 1997, "On the resemblance and containment of documents".
    """
    from datasketch import MinHash, MinHashLSH

    order = sorted(rows, key=lambda name: (("test", "dev", "train").index(sides[name]), name))
    bands = _bands(jaccard)
    index: Any = MinHashLSH(num_perm=PERMUTATIONS, params=(bands, PERMUTATIONS // bands))
    hashes = MinHash.generator((_grams(rows[name]) for name in order), num_perm=PERMUTATIONS)
    pairs: list[NearDuplicate] = []
    limited = 0
    for place, (name, hashed) in enumerate(zip(order, hashes, strict=True)):
        own = _grams(rows[name])
        proposed = sorted(index.query(hashed))
        like = next(
            (other for other in proposed[:COMPARED] if _similar(own, _grams(rows[order[other]]), jaccard)), None
        )
        limited += like is None and len(proposed) > COMPARED
        if like is not None:
            pairs.append(NearDuplicate(name, order[like]))
        if like is None or sides[name] == "test":
            index.insert(place, hashed, check_duplication=False)
    return NearDuplicates(pairs, limited)


def not_all_compared(limited: int) -> str:
    """What a note says behind its counts where some rows were not compared with every proposal."""
    if not limited:
        return ""
    return f"; {limited} rows were compared with {COMPARED} of the rows that MinHash proposed, not with all"


def _grams(row: Sequence[Message]) -> set[bytes]:
    """Word 5-grams of the turns. Without system turns: a long one in all rows would make all of them similar."""
    turns = [turn.get("content") or "" for turn in row if turn["role"] not in ("system", "developer")]
    words = " ".join(turns).split()
    return {" ".join(words[i : i + GRAM]).encode() for i in range(max(1, len(words) - GRAM + 1))}


def _similar(a: set[bytes], b: set[bytes], jaccard: float) -> bool:
    return len(a & b) >= jaccard * len(a | b)


def _bands(jaccard: float) -> int:
    """Fewest bands b of r rows each, b * r <= 128, with 1 - (1 - jaccard ** r) ** b >= 0.8: the fewest proposals."""
    return next(
        bands for bands in range(1, PERMUTATIONS + 1) if 1 - (1 - jaccard ** (PERMUTATIONS // bands)) ** bands >= FOUND
    )
