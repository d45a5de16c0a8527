"""The intervals against brute force, against textbook values, and by their coverage on simulated arms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from flows.results.draws import draw
from flows.results.stats import (
    Estimand,
    Interval,
    Studentized,
    Sums,
    difference_intervals,
    effective_groups,
    mean_interval,
    proportion_interval,
    quantile_interval,
    repeats,
    standard_error,
    student,
    studentized,
    t_critical,
    upper_quantile,
)
from recipes.checks.power import FEWEST_GROUPS

Rng = np.random.Generator
Arms = Callable[[Rng, int, int], list[Sums]]  # (rng, groups, arms) -> arms with equal true means


def ones(scores: np.ndarray) -> Sums:
    """One row a group, one score a row."""
    return Sums(np.asarray(scores, dtype=float), np.ones(len(scores)))


def binary(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """Right or wrong with p = 0.8, independent between arms."""
    return [ones(rng.random(groups) < 0.8) for _ in range(arms)]


def heavy(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """Losses of rows with 10 to 39 tokens: a difficulty that arms share, Student's t with 3 degrees as noise."""
    count = rng.integers(10, 40, groups).astype(float)
    shared = 0.5 + rng.lognormal(-0.3, 0.8, groups)
    return [Sums((shared + 0.3 * rng.standard_t(3, groups)) * count, count) for _ in range(arms)]


def clustered(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """Losses of groups of one to five rows: half of an arm's noise is its group's, half is each row's own."""
    rows = rng.integers(1, 6, groups)
    count = 20.0 * rows
    shared = 0.5 + rng.lognormal(-0.3, 0.8, groups)
    own = [rng.normal(0, 0.2, groups) + rng.normal(0, 0.2, groups) / np.sqrt(rows) for _ in range(arms)]
    return [Sums((shared + noise) * count, count) for noise in own]


def three_points_worse(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """Right with p = 0.77 against p = 0.80, independent."""
    del arms
    return [ones(rng.random(groups) < 0.77), ones(rng.random(groups) < 0.8)]


def flipped(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """Right with p = 0.8; the first arm turns 12 % of all rows into the opposite: -7.2 points."""
    del arms
    right = rng.random(groups) < 0.8
    return [ones(right ^ (rng.random(groups) < 0.12)), ones(right)]


def harder_rows_lose_more(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """Losses with heavy-tailed noise; the first arm's are 10 % higher, so that hard rows differ more."""
    count = rng.integers(10, 40, groups).astype(float)
    shared = 0.5 + rng.lognormal(-0.3, 0.8, groups)
    noise = 0.3 * rng.standard_t(3, (2, groups))
    return [Sums((1.1 * shared + noise[0]) * count, count), Sums((shared + noise[1]) * count, count)]


def clustered_and_worse(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """As `clustered`; the first arm loses 0.2 nats a token more, of which every group has its own part."""
    a, b = clustered(rng, groups, arms)
    return [Sums(a.total + rng.gamma(2, 0.1, groups) * a.count, a.count), b]


def lognormal(rng: Rng, groups: int, arms: int) -> list[Sums]:
    """Losses with skewness 6 and an independent draw for every arm."""
    count = rng.integers(10, 40, groups).astype(float)
    return [Sums(rng.lognormal(-0.5, 1, groups) * count, count) for _ in range(arms)]


def flips(groups: int, right: int, wrong: int) -> Estimand:
    """a right where b is wrong in `right` rows, the other way round in `wrong` rows, equal in all others."""
    a, b = np.ones(groups), np.ones(groups)
    b[:right], a[right : right + wrong] = 0, 0
    return Estimand(ones(a), ones(b), "share")


def one_interval(estimand: Estimand, draws: np.ndarray) -> Interval:
    return difference_intervals(studentized([estimand], draws))[0]


def excludes_zero(interval: Interval) -> bool:
    return not interval.low <= 1e-12 or not interval.high >= -1e-12


# ---- the arithmetic


def test_every_resample_draws_as_many_groups_as_there_are() -> None:
    draws = draw(37, resamples=500)
    assert draws.shape == (500, 37)
    assert (draws.sum(axis=1) == 37).all()
    assert np.array_equal(draws, draw(37, resamples=500))
    assert not np.array_equal(draws, draw(37, seed=1, resamples=500))
    # Var of a count is 1 - 1/37; 18,500 counts estimate it within 0.03 (three standard errors).
    assert draws.var() == pytest.approx(1 - 1 / 37, abs=0.03)


@pytest.mark.parametrize("link", ["mean", "exp"])
def test_weights_give_what_a_loop_over_copied_groups_gives(link: str) -> None:
    rng = np.random.default_rng(3)
    count = rng.integers(5, 30, 40).astype(float)
    a, b = (Sums(rng.lognormal(0, 1, 40) * count, count) for _ in range(2))
    draws = draw(40, resamples=60)
    found = studentized([Estimand(a, b, link)], draws)[0]  # type: ignore[arg-type]
    for t, weights in zip(found.t, draws, strict=True):
        groups = np.repeat(np.arange(40), weights)  # the resample, spelled out
        n = count[groups].sum()
        means = [arm.total[groups].sum() / n for arm in (a, b)]
        residual = a.total[groups] - b.total[groups] - (means[0] - means[1]) * count[groups]
        alone = residual / (1 - count[groups] / count.sum())  # what the mean moves by without the group, times n
        se = np.sqrt(39 / 40 * (alone**2).sum()) / n
        assert t == pytest.approx(
            (means[0] - means[1] - (a.value - b.value)) / se, rel=1e-9, abs=1e-9
        )  # t is kept to nine digits
    plain = a.value - b.value if link == "mean" else np.exp(a.value) - np.exp(b.value)
    assert found.estimate == pytest.approx(plain, rel=1e-12)


def test_groups_are_resampled_not_rows() -> None:
    """Ten copies of each row in one group say nothing new; as groups of their own they would shrink it by sqrt(10)."""
    rng = np.random.default_rng(5)
    arms = binary(rng, 200, 2)
    draws = draw(200, resamples=2000)
    alone = one_interval(Estimand(*arms), draws)
    copied = one_interval(Estimand(*(Sums(arm.total * 10, arm.count * 10) for arm in arms)), draws)
    assert copied == pytest.approx(alone)
    apart = [ones(np.repeat(arm.total, 10)) for arm in arms]
    narrow = one_interval(Estimand(*apart), draw(2000, resamples=500))
    ratio = (alone.high - alone.low) / (narrow.high - narrow.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.12)  # 500 resamples know a critical value to about 4 %


def test_perplexities_are_told_apart_as_losses_are() -> None:
    rng = np.random.default_rng(7)
    count = rng.integers(5, 30, 100).astype(float)
    low = Sums(rng.gamma(0.5, 0.1, 100) * count, count)
    far = Sums(low.total + (7 + rng.normal(0, 1.5, 100)) * count, count)
    draws = draw(100, resamples=2000)
    interval = one_interval(Estimand(low, far, "exp"), draws)
    # exp(7) = 1,097 against 1.05; the loss has a standard error of about 0.16, so the ends are 1,097 * exp(+-0.3).
    assert -2200 < interval.low < -1097 < interval.high < -550
    near = Sums(low.total * 1.0001, count)
    losses = one_interval(Estimand(near, low), draws)
    perplexities = one_interval(Estimand(near, low, "exp"), draws)
    assert excludes_zero(losses) and excludes_zero(perplexities)
    assert np.array(perplexities) == pytest.approx(np.array(losses) * np.exp(low.value), rel=1e-3)


def test_one_group_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two groups"):
        studentized([Estimand(ones(np.ones(1)))], draw(1, resamples=10))


# ---- words that must not be wrong


def test_the_same_artifact_under_two_names_is_never_different() -> None:
    rng = np.random.default_rng(11)
    draws = draw(120)
    for arm in (*heavy(rng, 120, 3), *binary(rng, 120, 3)):
        twin = Sums(arm.total.copy(), arm.count.copy())
        for link in ("mean", "share", "exp"):
            assert not excludes_zero(one_interval(Estimand(arm, twin, link), draws))


def test_planted_damage_is_seen() -> None:
    """0.15 nats a token; noise of 0.3 * sqrt(2 * 3) a row leaves a standard error of 0.042 at 300 rows: power 94 %."""
    rng = np.random.default_rng(13)
    seen = 0
    draws = draw(300, resamples=2000)
    for _ in range(50):
        a, b = heavy(rng, 300, 2)
        seen += one_interval(Estimand(Sums(a.total + 0.15 * a.count, a.count), b), draws).low > 0
    assert seen >= 42  # 47 expected, three standard deviations of 1.7 below


def test_few_discordant_rows_are_judged_as_a_sign_test_would() -> None:
    draws = draw(300)
    assert not excludes_zero(one_interval(flips(300, 4, 0), draws))  # sign test: p = 0.125
    assert excludes_zero(one_interval(flips(300, 9, 0), draws))  # p = 0.004
    assert not excludes_zero(one_interval(flips(300, 9, 5), draws))  # p = 0.42
    assert excludes_zero(one_interval(flips(300, 40, 15), draws))  # p = 0.001
    # 13 % of the resamples hold neither of two discordant rows: they count as half a row's worth of doubt, not as none.
    two = flips(300, 2, 0)
    assert one_interval(Estimand(two.a, two.b), draws).low < -1 / 300


def test_no_discordant_row_still_leaves_room() -> None:
    interval = one_interval(flips(300, 0, 0), draw(300))
    assert interval.high == pytest.approx(3.69 / 300, rel=0.01)  # -ln(0.025) = 3.69: the rule of three
    assert interval.low == -interval.high


def test_simultaneous_intervals_lie_between_plain_and_bonferroni() -> None:
    rng = np.random.default_rng(17)
    arms = heavy(rng, 150, 6)
    draws = draw(150)
    family = studentized([Estimand(arms[i], arms[j]) for i in range(6) for j in range(i)], draws)
    plain = [difference_intervals([one])[0] for one in family]
    together = difference_intervals(family)
    for one, alone, joint in zip(family, plain, together, strict=True):
        critical = float(np.quantile(np.abs(one.t), 1 - 0.05 / 15, method="higher"))
        bonferroni = one.symmetric(max(critical, student(one.effective, 1 - 0.05 / 15)))
        assert alone.high < joint.high <= bonferroni.high
    # The 15 differences of 6 arms are no 15 independent ones: clearly narrower than Bonferroni (about 4 % here).
    assert np.mean([joint.high - one.at for one, joint in zip(family, together, strict=True)]) < 0.99 * np.mean(
        [one.symmetric(float(np.quantile(np.abs(one.t), 1 - 0.05 / 15))).high - one.at for one in family]
    )


def test_sparse_members_do_not_widen_the_others() -> None:
    """One or two discordant rows have few, large values of |t|; on its own scale each is as common as it is."""
    clear = Estimand(*binary(np.random.default_rng(19), 300, 2), "share")
    sparse = [flips(300, 1, 0), flips(300, 2, 0), flips(300, 0, 0)]
    one, *others = studentized([clear, *sparse], draw(300))
    alone, beside = difference_intervals([one])[0], difference_intervals([one, *others])[0]
    assert alone.high <= beside.high < one.symmetric(2.25).high  # 1.96 alone; normal quantile at 1 - 0.05 / 4 is 2.24


# ---- one arm


def test_wilson_at_the_ends_and_by_the_book() -> None:
    none_right = proportion_interval(ones(np.zeros(300)))
    assert none_right.low == 0 and none_right.high == pytest.approx(0.0126, abs=0.0003)  # z**2 / (n + z**2)
    all_right = proportion_interval(ones(np.ones(300)))
    assert all_right == pytest.approx((1 - none_right.high, 1))
    eighty = np.zeros(100)
    eighty[:80] = 1
    # Wilson for 80 of 100 is [0.7112, 0.8666]; ours has 99 in place of 100 from the unbiased variance.
    assert proportion_interval(ones(eighty)) == pytest.approx((0.7112, 0.8666), abs=0.0006)


def test_a_proportion_of_rows_that_stand_and_fall_together_is_less_sure() -> None:
    rng = np.random.default_rng(23)
    right = (rng.random(60) < 0.8).astype(float)
    apart, together = (
        proportion_interval(ones(np.repeat(right, 5))),
        proportion_interval(Sums(right * 5, np.full(60, 5.0))),
    )
    assert together.high - together.low == pytest.approx(np.sqrt(5) * (apart.high - apart.low), rel=0.05)


def test_p99_is_the_smallest_value_with_99_percent_at_or_below() -> None:
    assert upper_quantile(np.arange(1, 101, dtype=float)) == 99
    assert upper_quantile(np.arange(1, 1001, dtype=float)) == 990


def test_p99_interval_equals_brute_force() -> None:
    rng = np.random.default_rng(29)
    values, group = rng.lognormal(0, 1.5, 3000), rng.integers(0, 80, 3000)
    draws = draw(80, resamples=200)
    brute = [upper_quantile(values, weights[group].astype(float)) for weights in draws]
    assert quantile_interval(values, group, draws) == pytest.approx(tuple(np.quantile(brute, [0.025, 0.975])))


def test_timings_read_the_same_as_seconds_and_as_rates() -> None:
    seconds = [1.0, 1.1, 0.9, 1.3, 1.0]
    slow, fast = repeats(seconds), repeats([1 / one for one in seconds])
    assert slow.value * fast.value == pytest.approx(1)
    assert slow.interval.low * fast.interval.high == pytest.approx(1)
    assert slow.interval.low < slow.value < slow.interval.high
    with pytest.raises(ValueError, match="two or more"):
        repeats([1.0])


def test_t_quantiles_by_the_book() -> None:
    # From four degrees of freedom on (five repeats, the fewest a recipe can ask for).
    for df, quantile in ((4, 2.7764), (9, 2.2622), (29, 2.0452)):
        assert t_critical(df) == pytest.approx(quantile, abs=0.001)


def test_lopsided_groups_count_as_fewer_of_equal_size() -> None:
    assert effective_groups(np.full(12, 7.0)) == pytest.approx(12)
    half = np.array([19.0, *np.ones(19)])  # one of 20 groups holds half of the tokens
    assert effective_groups(half) == pytest.approx(38**2 / (19**2 + 19))
    assert 3.7 < effective_groups(half) < 3.9
    assert effective_groups(np.array([1e6, 1.0, 1.0])) == pytest.approx(1, abs=1e-4)


def test_critical_values_are_at_least_students_by_the_book() -> None:
    for effective, level, quantile in ((5, 0.95, 2.7764), (30, 0.95, 2.0452), (5, 0.99, 4.6041), (1e7, 0.95, 1.95996)):
        assert student(effective, level) == pytest.approx(quantile, abs=1e-4)
    rng = np.random.default_rng(59)
    pairs = [Estimand(*heavy(rng, 8, 2)) for _ in range(20)]
    for one in studentized(pairs, draw(8, resamples=1000)):
        half = (one.symmetric(1.0).high - one.at) * student(one.effective)
        (interval,) = difference_intervals([one])
        assert interval.high - one.at >= half * (1 - 1e-12) and one.effective < 8
        low, high = mean_interval(one)
        assert min(high - one.at, one.at - low) >= half * (1 - 1e-12)


def test_standard_errors_are_those_of_leaving_out_each_group() -> None:
    rng = np.random.default_rng(61)
    count = np.array([400.0, *rng.integers(5, 60, 14)])
    sums = Sums(rng.gamma(2, 0.5, 15) * count, count)
    without = [np.delete(sums.total, group).sum() / np.delete(count, group).sum() for group in range(15)]
    jackknife = np.sqrt(14 / 15 * ((np.array(without) - sums.value) ** 2).sum())
    assert standard_error(Estimand(sums)) == pytest.approx(jackknife, rel=1e-12)


def test_a_proportion_of_few_groups_is_widened_by_students_t() -> None:
    """Korn and Graubard's effective size: 6 groups of 50 rows that differ as rows of their own would."""
    rng = np.random.default_rng(67)
    right = (rng.random(300) < 0.8).astype(float)
    apart = proportion_interval(ones(right))
    shares = np.array([38, 43, 36, 41, 42, 40.0])  # variance near 50 * 0.8 * 0.2 = 8
    few = proportion_interval(Sums(shares, np.full(6, 50.0)))
    many = proportion_interval(Sums(np.repeat(shares, 10) / 10, np.full(60, 5.0)))
    assert few.high - few.low > 1.15 * (apart.high - apart.low)  # t with 5 degrees against 299: 2.57 / 1.97
    assert many.high - many.low < few.high - few.low


# ---- coverage


def misses(arms: Arms, groups: int, *, truth: float = 0.0, simulations: int = 2000, per_draw: int = 100) -> float:
    """Per cent of intervals of a - b that do not hold the true difference; of equal arms, that are called different."""
    rng, wrong = np.random.default_rng([31, groups]), 0
    for start in range(0, simulations, per_draw):
        draws = draw(groups, seed=start, resamples=1000)
        pairs = [Estimand(*arms(rng, groups, 2)) for _ in range(per_draw)]
        intervals = [difference_intervals([one])[0] for one in studentized(pairs, draws)]
        wrong += sum(excludes_zero(Interval(low - truth, high - truth)) for low, high in intervals)
    return 100 * wrong / simulations


def family_errors(arms: Arms, groups: int, *, simulations: int) -> float:
    """Per cent of families of 15 comparisons (6 equal arms) in which at least one is called different."""
    rng, wrong = np.random.default_rng([37, groups]), 0
    for start in range(simulations):
        draws = draw(groups, seed=start // 10, resamples=1000)
        six = arms(rng, groups, 6)
        family = studentized([Estimand(six[i], six[j]) for i in range(6) for j in range(i)], draws)
        wrong += any(excludes_zero(one) for one in difference_intervals(family))
    return 100 * wrong / simulations


def single_misses(
    make: Callable[[Rng], Sums], truth: float, interval: Callable[[Studentized, Sums], Interval]
) -> float:
    """Per cent of intervals of one arm at 300 groups that miss the true mean."""
    rng, wrong = np.random.default_rng(41), 0
    for start in range(50):
        draws = draw(300, seed=start, resamples=1000)
        arms = [make(rng) for _ in range(40)]
        for one, arm in zip(studentized([Estimand(arm) for arm in arms], draws), arms, strict=True):
            low, high = interval(one, arm)
            wrong += not low <= truth <= high
    return 100 * wrong / 2000


# 5 % is meant. 2,000 simulations have a standard error of 0.5 points, so 3.5-6.5 is three of them to either side.
@pytest.mark.parametrize("arms", [binary, heavy, clustered])
def test_false_differences_at_100_groups(arms: Arms) -> None:
    assert 3.5 <= misses(arms, 100) <= 6.5


@pytest.mark.slow
@pytest.mark.parametrize("groups", [300, 1000])
@pytest.mark.parametrize("arms", [binary, heavy, clustered, lognormal])
def test_false_differences_at_more_groups(arms: Arms, groups: int) -> None:
    assert 3.5 <= misses(arms, groups) <= 6.5


# E[shared] of harder_rows_lose_more is 0.5 + exp(-0.3 + 0.8**2 / 2).
WORSE: list[tuple[Arms, float]] = [
    (three_points_worse, -0.03),
    (flipped, 0.12 * (0.2 - 0.8)),
    (harder_rows_lose_more, 0.1 * (0.5 + float(np.exp(0.02)))),
    (clustered_and_worse, 0.2),
]


@pytest.mark.parametrize(("arms", "truth"), WORSE)
def test_true_differences_are_covered_at_300_groups(arms: Arms, truth: float) -> None:
    assert 93.5 <= 100 - misses(arms, 300, truth=truth) <= 96.5


@pytest.mark.slow
@pytest.mark.parametrize(("arms", "truth"), WORSE)
def test_true_differences_are_covered_at_1000_groups(arms: Arms, truth: float) -> None:
    assert 93.5 <= 100 - misses(arms, 1000, truth=truth) <= 96.5


@pytest.mark.slow
@pytest.mark.parametrize(("arms", "truth"), WORSE)
def test_true_differences_are_covered_at_100_groups(arms: Arms, truth: float) -> None:
    # The first 2,000 of clustered_and_worse cover 93.7 %, by chance: all 20,000 cover 95.2 %.
    assert 93.5 <= 100 - misses(arms, 100, truth=truth, simulations=20_000) <= 96.5


@pytest.mark.slow
def test_skewed_losses_at_100_rows_err_on_the_safe_side() -> None:
    # 3.6 % over 20,000 simulations; the percentile bootstrap's 6.8 to 8.4 % is the reason for studentizing.
    assert 2.5 <= misses(lognormal, 100) <= 5.0


def test_the_percentile_bootstrap_would_fail_here() -> None:
    """The simulation can tell a bad interval: heavy tails at 30 rows, percentile against studentized."""
    rng, percentile, ours = np.random.default_rng(43), 0, 0
    for start in range(0, 1000, 40):
        draws = draw(30, seed=start, resamples=1000)
        for _ in range(40):
            a, b = heavy(rng, 30, 2)
            moved = draws @ (a.total - b.total) / (draws @ a.count)
            percentile += excludes_zero(Interval(*np.quantile(moved, [0.025, 0.975])))
            ours += excludes_zero(one_interval(Estimand(a, b), draws))
    assert ours <= 65 < percentile  # of 1,000


# Tokens of the groups, how much of the noise is a group's own (the rest is its rows'), and how often the interval of a
# difference may miss, per cent. Where a bound is below 3.5 the interval is too wide, and docs/report.md says so.
FEW: dict[str, tuple[list[float], float, tuple[float, float]]] = {
    "5 equal groups": ([1] * 5, 1.0, (1.0, 3.5)),
    "8 equal groups": ([1] * 8, 1.0, (2.4, 6.5)),  # 3.7 over 8,000
    "20 equal groups": ([1] * 20, 1.0, (3.5, 6.5)),
    "3 of 20 hold 72 %": ([0.24] * 3 + [0.28 / 17] * 17, 0.5, (3.5, 6.5)),
    "2 of 20 hold 60 %": ([0.3] * 2 + [0.4 / 18] * 18, 0.5, (3.5, 6.5)),
    "20 groups, the n-th has 1 / n": ([1 / n for n in range(1, 21)], 0.5, (3.5, 6.5)),
    "1 of 20 holds 42 %": ([0.42] + [0.58 / 19] * 19, 0.5, (2.0, 5.0)),
    "5 of 300 hold 95 %": ([0.19] * 5 + [0.05 / 295] * 295, 0.5, (0.3, 3.5)),
}


def few_groups(sizes: list[float], own: float, *, even: bool = True) -> Arms:
    """Losses whose noise is in part the group's, in part that of its rows; skewness 1.75 where it is not even."""
    rows = np.asarray(sizes) / min(sizes)

    def noise(rng: Rng) -> np.ndarray:
        drawn = rng.normal(size=len(rows)) if even else rng.lognormal(0, 0.5, len(rows))
        return drawn if even else (drawn - np.exp(0.125)) / np.sqrt((np.exp(0.25) - 1) * np.exp(0.25))

    def arms(rng: Rng, groups: int, arms: int) -> list[Sums]:
        assert groups == len(rows) and arms == 2
        moved = np.sqrt(own) * noise(rng) + np.sqrt((1 - own) / rows) * noise(rng)
        return [Sums((2 + by) * 20 * rows, 20 * rows) for by in (moved, np.zeros(len(rows)))]

    return arms


@pytest.mark.parametrize("name", FEW)
def test_few_and_lopsided_groups_are_covered(name: str) -> None:
    sizes, own, (least, most) = FEW[name]
    assert effective_groups(np.asarray(sizes)) >= FEWEST_GROUPS - 1e-9
    assert least <= misses(few_groups(sizes, own), len(sizes)) <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_skewed_noise_of_few_and_lopsided_groups(name: str) -> None:
    """Outside the goal where three of 20 groups hold most: 7.4 % over 8,000, 7.9 % where all noise is the group's."""
    sizes, own, _ = FEW[name]
    assert misses(few_groups(sizes, own, even=False), len(sizes)) <= 8.5


def test_without_the_floor_lopsided_groups_would_be_called_different() -> None:
    """The simulation can tell: where one of 20 groups holds 42 % of the tokens, the bootstrap alone misses 8.9 %."""
    sizes, own, _ = FEW["1 of 20 holds 42 %"]
    rng, wrong, arms = np.random.default_rng(71), 0, few_groups(sizes, own)
    for start in range(0, 1000, 100):
        pairs = [Estimand(*arms(rng, 20, 2)) for _ in range(100)]
        family = studentized(pairs, draw(20, seed=start, resamples=1000))
        bare = [replace(one, effective=1e9) for one in family]
        wrong += sum(excludes_zero(difference_intervals([one])[0]) for one in bare)
    assert wrong > 65  # of 1,000


@pytest.mark.parametrize("name", ["8 equal groups", "20 groups, the n-th has 1 / n", "3 of 20 hold 72 %"])
def test_single_arms_of_few_and_lopsided_groups_are_covered(name: str) -> None:
    sizes, own, _ = FEW[name]
    rng, wrong, arms = np.random.default_rng(73), 0, few_groups(sizes, own)
    for start in range(0, 2000, 100):
        singles = [Estimand(arms(rng, len(sizes), 2)[0]) for _ in range(100)]
        for one in studentized(singles, draw(len(sizes), seed=start, resamples=1000)):
            low, high = mean_interval(one)
            wrong += not low <= 2 <= high
    assert 3.0 <= 100 * wrong / 2000 <= 7.0  # four standard errors: 3 of 20 with 72 % miss 6.0 % of the time


def test_families_of_few_groups_hold_together() -> None:
    """Six equal arms, 15 comparisons, eight groups: the floor is that of the family, not of one comparison."""
    assert family_errors(heavy, 8, simulations=400) <= 7.5


def test_families_hold_together() -> None:
    # At most 5 % is meant; 400 simulations have a standard error of 1.1 points. Unadjusted it would be above 25 %.
    assert 1.0 <= family_errors(heavy, 100, simulations=400) <= 7.5


@pytest.mark.slow
def test_binary_families_hold_together() -> None:
    assert 1.0 <= family_errors(binary, 300, simulations=1000) <= 7.5


def test_intervals_of_single_arms_cover() -> None:
    count = np.full(300, 20.0)
    # Skewed losses (lognormal 0.5) and p = 0.8; the bounds as above.
    losses = single_misses(
        lambda rng: Sums(rng.lognormal(-0.125, 0.5, 300) * count, count), 1.0, lambda one, arm: mean_interval(one)
    )
    shares = single_misses(lambda rng: ones(rng.random(300) < 0.8), 0.8, lambda one, arm: proportion_interval(arm))
    assert 3.5 <= losses <= 6.5
    assert 3.5 <= shares <= 6.5
