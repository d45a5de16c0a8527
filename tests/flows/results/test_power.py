"""The number of rows that the report asks for is held to its word by simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flows.results.draws import draw
from flows.results.power import LOSS, Needed, needed, power, sentence
from flows.results.rows import RowScores
from flows.results.stats import Estimand, Sums, difference_intervals, studentized
from tests.flows.paths import arm, evidence

Rng = np.random.Generator
Pair = tuple[np.ndarray, np.ndarray]


def scores(right: np.ndarray, group: np.ndarray) -> RowScores:
    """A row a score."""
    names = np.asarray([f"{index:06d}" for index in range(len(right))])
    ones = np.ones(len(right))
    return RowScores(names, np.asarray([f"{one:06d}" for one in group]), names, right.astype(float), ones)


def independent(rng: Rng, group: np.ndarray, loss: float) -> Pair:
    """Two arms that are right on rows of their own: the most rows are needed."""
    return rng.random(len(group)) < 0.8 - loss, rng.random(len(group)) < 0.8


def near(rng: Rng, group: np.ndarray, loss: float) -> Pair:
    """As a quantized model and its origin: 2 % of the rows flip each way, and right rows are lost on top."""
    right = rng.random(len(group)) < 0.8
    flipped = right ^ (rng.random(len(group)) < np.where(right, 0.02 / 0.8, 0.02 / 0.2))
    kept = rng.random(len(group)) >= loss / 0.8
    return flipped & kept, right


def together(rng: Rng, group: np.ndarray, loss: float) -> Pair:
    """Rows of a group are right or wrong together, and half of what is lost is lost by whole groups."""
    size = int(group.max()) + 1
    right = (rng.random(size) < 0.8)[group]
    lost = (rng.random(size) < 0.02)[group] | (rng.random(len(group)) < 0.02)  # 3.96 % of the rows
    won = rng.random(len(group)) < 0.0396 * 0.8 / 0.2  # as many as are lost
    kept = rng.random(len(group)) >= loss / 0.8
    return np.where(right, ~lost, won) & kept, right


Arms = Callable[[Rng, np.ndarray, float], Pair]


def plan(arms: Arms, *, rows_a_group: int) -> Needed:
    """What a test set of 20,000 rows asks for: the planning itself, without the noise of a small pilot."""
    rng = np.random.default_rng(1)
    group = np.arange(20_000) // rows_a_group
    a, b = arms(rng, group, 0.0)
    return needed(scores(a, group), scores(b, group))


def shown(arms: Arms, at: Needed, *, rows_a_group: int, simulations: int = 1000) -> float:
    """Per cent of test sets of so many groups in which a loss of 3 points is called a difference, in its direction."""
    rng, found = np.random.default_rng(2), 0
    group = np.arange(at.groups * rows_a_group) // rows_a_group
    count = np.full(at.groups, float(rows_a_group))

    def summed(right: np.ndarray) -> Sums:
        return Sums(np.bincount(group, right, at.groups), count)

    for start in range(0, simulations, 50):
        pairs = [Estimand(*map(summed, arms(rng, group, LOSS)), "share") for _ in range(50)]
        told = studentized(pairs, draw(at.groups, seed=start, resamples=600))
        found += sum(difference_intervals([one])[0].high < 0 for one in told)
    return 100 * found / simulations


# 80 % is meant; 1,000 simulations have a standard error of 1.3 points.
@pytest.mark.parametrize(("arms", "rows_a_group"), [(near, 1), (together, 4)])
def test_the_rows_that_it_asks_for_show_three_points(arms: Arms, rows_a_group: int) -> None:
    at = plan(arms, rows_a_group=rows_a_group)
    assert at.rows == at.groups * rows_a_group
    assert 75 <= shown(arms, at, rows_a_group=rows_a_group) <= 85


@pytest.mark.slow
def test_arms_that_are_right_on_rows_of_their_own_need_most() -> None:
    at = plan(independent, rows_a_group=1)
    assert at.rows > 2 * plan(near, rows_a_group=1).rows
    assert 75 <= shown(independent, at, rows_a_group=1) <= 85


def test_arms_that_agree_on_every_row_still_need_rows() -> None:
    """No discordant row yet: what three points would add is all the variance that there is."""
    right = np.arange(100) % 5 > 0
    at = needed(scores(right, np.arange(100)), scores(right, np.arange(100)))
    assert at == Needed(rows=254, groups=254)  # 0.03 * 0.97 * ((1.96 + 0.84) / 0.03) ** 2 = 253.8


def test_more_is_needed_for_less() -> None:
    rng = np.random.default_rng(3)
    a, b = (scores(one, np.arange(400)) for one in near(rng, np.arange(400), 0.0))
    assert needed(a, b, loss=0.01).rows > 5 * needed(a, b, loss=0.03).rows


def test_the_report_plans_every_scheme_or_says_why_not() -> None:
    rng = np.random.default_rng(4)
    a, b = (scores(one, np.arange(400)) for one in near(rng, np.arange(400), 0.0))
    arms = (
        arm("merged-dequantized", merge_base="dequantized"),
        arm("gptq-w4-g128", scheme="gptq-w4-g128", merge_base="dequantized"),
        arm("rtn-w4-g128", scheme="rtn-w4-g128", merge_base="dequantized"),
        arm("awq-w4-g128.on-base", scheme="awq-w4-g128", on_base=True),
    )
    found = power(evidence(arms, {"merged-dequantized": {"task": b}, "gptq-w4-g128": {"task": a}}))
    assert [one["arm"] for one in found] == ["gptq-w4-g128", "rtn-w4-g128"]
    planned, unplanned = found
    assert (planned["rows"], planned["rows_needed"]) == (400, needed(a, b).rows)
    assert (unplanned["rows_needed"], unplanned["reason"]) == (None, "rtn-w4-g128: no task scores")
    text = sentence(found)
    assert text is not None and f"needs {needed(a, b).rows:,} rows (gptq-w4-g128); it has 400" in text
    assert sentence([unplanned]) is None
