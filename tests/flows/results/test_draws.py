"""Draws that are made anew: bit for bit those that are kept, in memory that does not grow with the groups."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from flows.results import cells
from flows.results.cells import Draws
from flows.results.draws import CHUNK_BYTES, RESAMPLES, Resamples, draw
from flows.results.stats import Estimand, Sums, quantile_interval, studentized


def names(groups: int) -> tuple[str, ...]:
    return tuple(map(str, range(groups)))


@pytest.mark.parametrize("groups", [2, 40, 20_011])  # the last in 24 blocks of 419, each drawn in parts of 52
def test_draws_made_anew_are_those_that_are_kept(groups: int) -> None:
    resamples = 600 if groups > 1000 else RESAMPLES
    rng = np.random.default_rng([20_260_101, groups])  # as one array, the way the first reports were made
    plain = [np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(min(resamples, 600))]
    anew = Resamples(groups, resamples=resamples)
    kept = draw(groups, resamples=resamples)
    assert np.array_equal(kept[: len(plain)], plain)
    assert np.array_equal(np.concatenate(list(anew.blocks())), kept)
    assert np.array_equal(np.concatenate(list(anew.first(50).blocks())), kept[:50])
    count = rng.integers(5, 30, groups).astype(float)
    a, b = (Sums(rng.lognormal(0, 1, groups) * count, count) for _ in range(2))
    for one, other in zip(*(studentized([Estimand(a, b), Estimand(a)], told) for told in (anew, kept)), strict=True):
        assert np.array_equal(one.t, other.t) and one.se == other.se
    values, owner = rng.lognormal(0, 1, 3 * groups), np.repeat(np.arange(groups), 3)
    assert quantile_interval(values, owner, anew.first(200)) == quantile_interval(values, owner, kept[:200])


def test_memory_does_not_grow_with_the_groups() -> None:
    """Some blocks of 100,000 groups: all 10,000 draws would be a gigabyte, and 300 of them 30 MB as bytes."""
    groups = 100_000
    scores = Sums(np.random.default_rng(0).lognormal(0, 1, groups), np.ones(groups))
    anew = Draws()(names(groups))
    assert isinstance(anew, Resamples) and anew.resamples == RESAMPLES
    tracemalloc.start()
    try:
        studentized([Estimand(scores)], anew.first(170))
        two = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        studentized([Estimand(scores)], anew.first(300))
        four = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert four < 1.05 * two  # twice as many resamples take no more
    assert four < 1.6 * CHUNK_BYTES  # a block as floats and bytes, what is being drawn, and the columns


def test_draws_that_are_kept_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "KEPT_BYTES", 100 * RESAMPLES)
    draws = Draws()
    first = draws(names(60))
    assert draws(tuple(f"other {number}" for number in range(60))) is first  # as many groups have the same draws
    draws(names(30))
    assert draws(names(60)) is first and set(draws.known) == {30, 60}
    draws(names(20))  # 110 would be too many: what was used longest ago goes
    assert set(draws.known) == {60, 20}
    assert isinstance(draws(names(101)), Resamples) and set(draws.known) == {60, 20}
    again = draws(names(30))
    assert isinstance(again, np.ndarray) and np.array_equal(again, draw(30))
