"""Resamples of groups of rows: how often each was drawn, from a seed, block by block.

Kept as one byte a resample and group, or made anew at every use where there are many groups: the same either way, bit
for bit, since the stream of random numbers does not depend on how it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
QUANTILE_RESAMPLES = 1_000
SEED = 20_260_101
CHUNK_BYTES = 64 * 2**20  # float64 weights that exist at once
DRAWN_BYTES = 8 * 2**20  # of 64-bit integers that are drawn at once; three such arrays exist

Floats = NDArray[np.float64]
Counts = NDArray[np.uint8]


@dataclass(frozen=True)
class Resamples:
    """How often each group was drawn, made from the seed block by block at every use, and never kept.

    The same for every metric with so many groups; fewer resamples are the first ones of more.
    """

    groups: int
    seed: int = SEED
    resamples: int = RESAMPLES

    def blocks(self) -> Iterator[Counts]:
        """[resamples of this block, groups], in order."""
        rng = np.random.default_rng([self.seed, self.groups])
        for rows in blocks_of(self.resamples, self.groups):
            counts = np.empty((len(rows), self.groups), dtype=np.uint8)
            step = max(1, DRAWN_BYTES // (8 * self.groups))
            for start in range(0, len(rows), step):
                picked = rng.integers(self.groups, size=(min(step, len(rows) - start), self.groups))
                picked += np.arange(len(picked))[:, None] * self.groups
                counted = np.bincount(picked.ravel(), minlength=picked.size)
                counts[start : start + len(picked)] = counted.reshape(picked.shape)
            yield counts

    def first(self, resamples: int) -> Resamples:
        """The first so many of them."""
        return replace(self, resamples=resamples)


Drawn = Counts | Resamples  # kept as bytes, or made anew


def draw(groups: int, *, seed: int = SEED, resamples: int = RESAMPLES) -> Counts:
    """[resamples, groups] all of `Resamples`, one byte each."""
    draws, start = np.empty((resamples, groups), dtype=np.uint8), 0
    for counts in Resamples(groups, seed, resamples).blocks():
        draws[start : start + len(counts)] = counts
        start += len(counts)
    return draws


def blocks_of(resamples: int, groups: int) -> Iterator[range]:
    """Resamples whose float64 weights fit into CHUNK_BYTES."""
    block = max(1, CHUNK_BYTES // (8 * groups))
    return (range(start, min(start + block, resamples)) for start in range(0, resamples, block))


def counts_of(draws: Drawn) -> Iterator[Counts]:
    """[resamples of a block, groups], block by block."""
    if isinstance(draws, Resamples):
        return draws.blocks()
    return (draws[rows.start : rows.stop] for rows in blocks_of(*draws.shape))


def groups_of(draws: Drawn) -> int:
    """How many groups they are draws of."""
    return draws.groups if isinstance(draws, Resamples) else draws.shape[1]


def weighted_sums(draws: Drawn, columns: Floats) -> Floats:
    """[resamples, columns] draws @ columns, in blocks of float64."""
    return np.concatenate([counts.astype(np.float64) @ columns for counts in counts_of(draws)])
