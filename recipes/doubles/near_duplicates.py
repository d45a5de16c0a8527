"""Rows that are almost equal to another row: MinHash proposes, the exact Jaccard similarity of their grams decides.

Memory: some 200 bytes a row and none of the texts, so that a million rows fit 1 GiB; the grams are in a file.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.data.rows import STAYS, Side
from recipes.data.turns import Message
from recipes.doubles.grams import STEP, Grams, GramWriter, Hashes, compared_text, mixed

PERMUTATIONS = 128
FOUND = 0.8  # least share of the pairs just at the limit that MinHash has to propose
COMPARED = (
    100  # proposals per row that are compared exactly: rows from one form would else cost the square of their number
)
CHUNKS = ((0, 1), (1, 8), (8, COMPARED))  # of the proposals, compared at once: most often the first one decides


class NearDuplicate(NamedTuple):
    """A row and the row before it, in the order test, dev, train, that it is almost equal to."""

    row: str
    like: str


class NearDuplicates(NamedTuple):
    """The pairs, and how many rows had more than 100 proposals, of which the first 100 were compared."""

    pairs: list[NearDuplicate]
    limited: int


def near_duplicates(
    names: Sequence[str], sides: Sequence[Side], grams: Grams, *, jaccard: float, stay: Collection[Side] = ("test",)
) -> NearDuplicates:
    """Rows whose set of 5-grams has a Jaccard similarity of `jaccard` or more with that of an earlier row.

    Rows come in the order test, dev, train, and by name within a side. With a row that is almost equal to an earlier
    one later rows are not compared: only with rows that would stay.

    Args:
        names: Of all rows.
        sides: Side of each.
        grams: Of each, in the same order.
        jaccard: The limit.
        stay: Sides whose rows stay also where they are almost equal to an earlier one.

    Source: Broder 1997, "On the resemblance and containment of documents".
    """
    by_side = [[row for row, own in enumerate(sides) if own == side] for side in STAYS]
    order = [row for rows in by_side for row in sorted(rows, key=names.__getitem__)]
    found = alike(np.asarray(order, np.int64), grams, jaccard=jaccard, stay=np.asarray([own in stay for own in sides]))
    return NearDuplicates([NearDuplicate(names[row], names[like]) for row, like in found.pairs], found.limited)


def near_duplicate_turns(
    rows: Mapping[str, Sequence[Message]], sides: Mapping[str, Side], *, jaccard: float
) -> NearDuplicates:
    """`near_duplicates` of rows that are in memory.

    Args:
        rows: Turns by name.
        sides: Side of each.
        jaccard: The limit.
    """
    with tempfile.TemporaryDirectory(prefix="quench-grams-") as folder:
        writer = GramWriter(Path(folder) / "grams")
        for turns in rows.values():
            writer.add(compared_text(turns))
        grams = writer.finish()
        try:
            return near_duplicates(list(rows), [sides[name] for name in rows], grams, jaccard=jaccard)
        finally:
            grams.close()


class Alike(NamedTuple):
    """NearDuplicates by numbers of rows."""

    pairs: list[tuple[int, int]]
    limited: int


def alike(order: NDArray[np.int64], grams: Grams, *, jaccard: float, stay: NDArray[np.bool_]) -> Alike:
    """`near_duplicates` by numbers.

    Args:
        order: Numbers of the rows to compare, in the order of comparison.
        grams: Of all rows.
        jaccard: The limit.
        stay: [rows] whether a row stays also where it is almost equal to an earlier one.
    """
    buckets = _Buckets(_band_hashes(grams, _bands(jaccard))[:, order])
    pairs: list[tuple[int, int]] = []
    limited = 0
    for place in buckets.places:
        row = int(order[place])
        proposed = buckets.before(place)
        like = _first_alike(row, order[proposed[:COMPARED]], grams, jaccard)
        limited += like is None and len(proposed) > COMPARED
        if like is not None:
            pairs.append((row, like))
        if like is None or stay[row]:
            buckets.insert(place)
    return Alike(pairs, limited)


def not_all_compared(limited: int) -> str:
    """What a note says behind its counts where some rows were not compared with every proposal."""
    if not limited:
        return ""
    return f"; {limited} rows were compared with {COMPARED} of the rows that MinHash proposed, not with all"


class _Buckets:
    """Per band and band hash: the earlier rows that stay, of which each keeps the first 101.

    The first 100 of all proposals of a row are then among them, and whether there are more can be seen.

    Attributes:
        places: Rows that share a band hash with another, as places in the order of comparison.
    """

    def __init__(self, hashes: Hashes) -> None:
        """Find who shares a band hash.

        Args:
            hashes: [bands, rows] in the order of comparison.
        """
        bands, rows = hashes.shape
        groups = np.full((rows, bands), -1, np.int32)
        capacities: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        count = 0
        for band, values in enumerate(hashes):
            group, sizes = _numbered(values)
            shared = sizes > 1
            numbers = np.where(shared, count + np.cumsum(shared) - 1, -1)
            groups[:, band] = numbers[group]
            capacities.append(np.minimum(sizes[shared], COMPARED + 1))
            count += int(shared.sum())
        self._groups = groups
        self._starts = array("q", np.cumsum(np.concatenate(capacities)).tolist())
        self._filled = array("i", bytes(4 * count))
        self._members = array("i", bytes(4 * self._starts[-1]))
        self.places: list[int] = np.flatnonzero((groups >= 0).any(axis=1)).tolist()

    def before(self, place: int) -> list[int]:
        """Places before this one that it shares a band hash with."""
        members: set[int] = set()
        for group in self._of(place):
            start = self._starts[group]
            members.update(self._members[start : start + self._filled[group]])
        return sorted(members)

    def insert(self, place: int) -> None:
        """Let later rows find this one."""
        for group in self._of(place):
            free = self._starts[group] + self._filled[group]
            if free < self._starts[group + 1]:
                self._members[free] = place
                self._filled[group] += 1

    def _of(self, place: int) -> list[int]:
        return [group for group in self._groups[place].tolist() if group >= 0]


def _numbered(values: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Equal values as one number each, from 0, and how often each of them stands there."""
    unique: Any = np.unique(values, return_inverse=True, return_counts=True)
    return unique[1], unique[2]


def _first_alike(row: int, others: NDArray[np.int64], grams: Grams, jaccard: float) -> int | None:
    """The first of these rows whose similarity with this one reaches the limit."""
    size = grams.starts[row + 1] - grams.starts[row]
    sizes = grams.starts[others + 1] - grams.starts[others]
    able = np.minimum(sizes, size) >= jaccard * np.maximum(sizes, size)
    others, sizes = others[able], sizes[able]
    own = grams.of(row) if len(others) else None
    for start, end in CHUNKS:
        some = others[start:end]
        if own is None or not len(some):
            return None
        shared = _shared(own, [grams.of(other) for other in some.tolist()])
        alike = np.flatnonzero(shared >= jaccard * (size + sizes[start:end] - shared))
        if len(alike):
            return int(some[alike[0]])
    return None


def _shared(own: Hashes, others: Sequence[Hashes]) -> NDArray[np.int64]:
    """[others] how many grams each of them shares with this one; all are sorted."""
    every = np.concatenate(others)
    places = np.minimum(np.searchsorted(own, every), len(own) - 1)
    starts = np.cumsum([0, *map(len, others[:-1])])
    return np.add.reduceat(own[places] == every, starts, dtype=np.int64)


def _band_hashes(grams: Grams, bands: int) -> Hashes:
    """[bands, texts] one hash over the rows of each band: equal where all its minima are."""
    rows = PERMUTATIONS // bands
    hashes = np.zeros((bands, len(grams)), np.uint64)
    factors, terms = mixed(STEP * np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64)).reshape(2, -1)
    for batch in grams.batches():
        for number in range(bands * rows):
            permuted = batch.grams * (factors[number] | np.uint64(1)) + terms[number]
            band = hashes[number // rows, batch.first : batch.last]
            band[:] = mixed(band * STEP + np.minimum.reduceat(permuted, batch.starts))
    return hashes


def _bands(jaccard: float) -> int:
    """Fewest bands b of r rows each, b * r <= 128, with 1 - (1 - jaccard ** r) ** b >= 0.8: the fewest proposals."""
    return next(
        bands for bands in range(1, PERMUTATIONS + 1) if 1 - (1 - jaccard ** (PERMUTATIONS // bands)) ** bands >= FOUND
    )
