"""What two scores on n questions can bear: by hand, against exact tests, and against simulated answers."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from flows.results.stats import Z, wilson
from flows.results.unpaired import (
    Figure,
    counted,
    discordant,
    judged,
    least_shown,
    paired_interval,
    together_z,
)


def figure(text: str, *, percent: bool = False) -> Figure:
    value, scale = Decimal(text), 100 if percent else 1
    return Figure(value / scale, Decimal(1).scaleb(int(value.as_tuple().exponent)) / scale, text)


def exact(d: int, m: int) -> float:
    """p of McNemar's exact test."""
    return min(1.0, 2 * float(binom.sf((m + d) // 2 - 1, m, 0.5)))


def test_the_verdict_is_that_of_mcnemars_exact_test() -> None:
    """For each m the smallest difference that is shown; where the two differ, ours says less."""
    apart = []
    for m in range(1, 2001):
        differences = range(m % 2 or 2, m + 1, 2)
        ours = next((d for d in differences if (d - 1) ** 2 > Z**2 * m), m + 2)
        theirs = next((d for d in differences if exact(d, m) < 0.05), m + 2)
        assert ours >= theirs
        if ours != theirs:
            apart.append(exact(theirs, m))
    assert len(apart) == 17 and min(apart) > 0.0487  # the module says so


def test_the_verdict_follows_from_the_interval() -> None:
    """Every pair of scores on up to 24 questions, at every m that they leave room for."""
    seen = set()
    for n in (5, 12, 24):
        for x, y in itertools.product(range(n + 1), repeat=2):
            fewest, most = discordant(x, y, n)
            found = judged(x - y, n, most)
            shown = []
            for m in range(fewest, most + 1, 2):
                low, high = paired_interval(x - y, m, n)
                assert -1 <= low <= (x - y) / n <= high <= 1
                shown.append(low > 0 or high < 0)
            assert shown == sorted(shown, reverse=True)  # the fewer differ, the more is shown
            expected = "shown" if all(shown) else "depends" if any(shown) else "cannot"
            assert found.outcome == expected, (n, x, y)
            if found.agree is not None:
                assert found.agree == n - (fewest + 2 * (sum(shown) - 1))
            seen.add(expected)
    assert seen == {"shown", "depends", "cannot"}


def test_every_pairing_lies_between_the_bounds() -> None:
    n = 7
    answers = list(itertools.product((0, 1), repeat=n))
    most: dict[tuple[int, int], set[int]] = {}
    for a in answers:
        for b in answers:
            differ = sum(one != other for one, other in zip(a, b, strict=True))
            most.setdefault((sum(a), sum(b)), set()).add(differ)
    for (x, y), found in most.items():
        assert (min(found), max(found)) == discordant(x, y, n)


def test_six_questions_all_one_way_are_the_least() -> None:
    assert least_shown() == 6 and binomtest(6, 6).pvalue < 0.05 < binomtest(5, 5).pvalue
    assert judged(5, 10**6, 5).outcome == "cannot" and judged(6, 10**6, 6).outcome == "shown"
    assert least_shown(together_z(20)) > least_shown()
    assert judged(0, 100, 0).outcome == "cannot"


def test_the_interval_is_tangos() -> None:
    """Without the correction the root of the score equation; with it the same equation one question further."""
    n, ahead, behind = 44, 1, 10  # margins of a published example
    low, high = paired_interval(ahead - behind, ahead + behind, n)
    for end, sign in ((low, 1), (high, -1)):
        linear = (2 * n - ahead + behind) * end - ahead - behind
        share = (math.sqrt(linear**2 + 8 * n * behind * end * (1 - end)) - linear) / (4 * n)
        off = sign * (ahead - behind - n * end) - 1
        assert off == pytest.approx(Z * math.sqrt(n * (2 * share + end * (1 - end))), rel=1e-6)


@pytest.mark.parametrize(("right", "lost", "won"), [(0.6, 0.05, 0.02), (0.3, 0.3, 0.1), (0.9, 0.02, 0.02)])
def test_the_interval_holds_the_true_difference(right: float, lost: float, won: float) -> None:
    """2,000 simulated sets of 300 questions: 95 % or more, and not much more where enough questions differ."""
    rng = np.random.default_rng(7)
    drawn = rng.multinomial(300, [right, lost, won, 1 - right - lost - won], size=2000)
    ends = {(int(b), int(c)): paired_interval(int(b - c), int(b + c), 300) for _, c, b, _ in drawn}
    held = np.mean([ends[int(b), int(c)].low <= won - lost <= ends[int(b), int(c)].high for _, c, b, _ in drawn])
    assert 0.945 <= held <= 0.99


def test_wilson_by_hand() -> None:
    # 132 of 198: centre (p + z2/2n) / (1 + z2/n), p = 0.6667, z2 = 3.8415.
    low, high = wilson(132 / 198, 198)
    assert (low, high) == (pytest.approx(0.5984, abs=1e-4), pytest.approx(0.7286, abs=1e-4))
    assert wilson(0, 10).low == 0 and wilson(1, 10).high == 1 and wilson(0, 10).high > 0.2


def test_counts_that_a_figure_can_mean() -> None:
    assert counted(figure("66.7", percent=True), 198) == (132, 132, 132, True)
    assert counted(figure("66.9", percent=True), 198) == (132, 132, 132, False)  # 132.46
    assert counted(figure("0.669"), 14_042) == (9388, 9394, 9401, True)
    assert counted(figure("66.6", percent=True), 198) == (132, 132, 132, True)  # 66.66 cut off, not rounded
    assert counted(figure("1.0"), 7) == (7, 7, 7, True) and counted(figure("0"), 7) == (0, 0, 3, True)
    assert counted(figure("0.6666666667"), 3) == (2, 2, 2, True)
    assert counted(figure("-1.0", percent=True), 198) == (-2, -2, -2, True)
