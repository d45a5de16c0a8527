"""The share of a gain that an arm keeps: by hand, its coverage, and where it is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flows.report.kept import lead, reasons, rows
from flows.results.cells import ArmEvidence, Draws
from flows.results.draws import draw
from flows.results.kept import NOT_SHOWN, Gain, fieller, kept
from flows.results.paired import Paired
from flows.results.read import RunArm
from flows.results.rows import RowScores
from flows.results.stats import Sums

Rng = np.random.Generator
DRAWS = Draws()


def scores(total: np.ndarray, count: np.ndarray | None = None, *, group: int = 1) -> RowScores:
    names = np.asarray([f"{index:05d}" for index in range(len(total))])
    groups = np.asarray([f"{index // group:05d}" for index in range(len(total))])
    count = np.ones(len(total)) if count is None else count
    return RowScores(names, groups, np.full(len(total), ""), np.asarray(total, dtype=float), count.astype(float))


def answers(right: int, rows: int = 400, *, lost: int = 0) -> np.ndarray:
    """So many right answers from the front, the first `lost` of them wrong after all."""
    return np.array([float(lost <= index < right) for index in range(rows)])


def test_the_share_is_that_of_the_means_and_its_interval_holds_one() -> None:
    low, high, arm = (scores(one) for one in (answers(100), answers(300), answers(300, lost=20)))
    share = Gain.of(Paired(high, low, "share"), DRAWS).share(arm, DRAWS)
    assert share is not None
    assert share.value == pytest.approx((280 - 100) / (300 - 100))
    assert 0.8 < share.ci95.low < 0.9 < share.ci95.high < 1


def test_an_arm_with_the_very_answers_keeps_all_and_still_has_an_interval() -> None:
    """No row is discordant among 400: the rule of three leaves 3.7 / 400 of 0.5."""
    low, high = scores(answers(100)), scores(answers(300))
    share = Gain.of(Paired(high, low, "share"), DRAWS).share(high, DRAWS)
    assert share is not None and share.value == 1
    assert share.ci95 == pytest.approx((1 - 3.69 / 400 / 0.5, 1 + 3.69 / 400 / 0.5), abs=1e-3)


def test_two_of_three_questions_are_no_recovery() -> None:
    """Of 198 questions three were lost and two came back: 66.7 %, of a loss that is not shown."""
    high, low, arm = (scores(answers(right, 198)) for right in (120, 117, 119))
    gain = Gain.of(Paired(high, low, "share"), DRAWS)
    assert not gain.shown and gain.share(arm, DRAWS) is None


def test_fiellers_interval_is_the_set_of_shares_that_no_test_refuses() -> None:
    rng = np.random.default_rng(3)
    count = rng.integers(5, 40, 60).astype(float)
    bottom = Sums((0.4 + rng.normal(0, 0.3, 60)) * count, count)
    top = Sums(0.8 * bottom.total + rng.normal(0, 0.2, 60) * count, count)
    interval = fieller(top, bottom, 2.0)
    assert interval is not None
    for share in np.linspace(interval.low - 0.3, interval.high + 0.3, 41):
        left = Sums(top.total - share * bottom.total, count)
        se = np.sqrt(59 / 60 * ((left.apart * left.residual) ** 2).sum()) / count.sum()
        assert (abs(left.value) <= 2.0 * se) == (interval.low <= share <= interval.high)
    assert fieller(top, Sums(bottom.total - bottom.value * count, count), 2.0) is None  # a bottom of zero


def task(rng: Rng, truth: float) -> list[RowScores]:
    """low 0.6, high 0.678, of 400 rows; the arm loses and gains answers of its own and keeps `truth` of the gain."""
    low = rng.random(400) < 0.6
    high = np.where(low, rng.random(400) < 0.93, rng.random(400) < 0.3)
    lost = (1 - truth) * 0.078 / 0.678 + 0.03
    arm = np.where(high, rng.random(400) >= lost, rng.random(400) < 0.03 * 0.678 / 0.322)
    return [scores(one) for one in (arm, low, high)]


def loss(rng: Rng, truth: float) -> list[RowScores]:
    """120 rows in 30 groups, 10 to 39 tokens a row; gain and noise have parts that a group shares."""
    count = rng.integers(10, 40, 120)
    own = np.repeat(rng.normal(0, [[0.3], [0.15]], (2, 30)), 4, axis=1)
    gain = 0.3 + own[0]
    return [
        scores(one * count, count, group=4)
        for one in (2 - truth * gain - own[1] - rng.normal(0, 0.2, 120), np.full(120, 2.0), 2 - gain)
    ]


@pytest.mark.parametrize(("make", "groups", "truth"), [(task, 400, 0.9), (task, 400, 0.5), (loss, 30, 0.9)])
def test_the_interval_covers(make: object, groups: int, truth: float) -> None:
    """5 % is meant; 600 simulations have a standard error of 0.9 points. Refused ones are counted out."""
    rng, wrong, made = np.random.default_rng([5, groups]), 0, 0
    for simulation in range(600):
        if simulation % 50 == 0:
            resamples = draw(groups, seed=simulation, resamples=1000)
        arm, low, high = make(rng, truth)  # type: ignore[operator]
        known = Draws({groups: resamples})
        share = Gain.of(Paired(high, low, "share" if make is task else "mean"), known).share(arm, known)
        if share is not None:
            made += 1
            wrong += not share.ci95.low <= truth <= share.ci95.high
    assert made >= 480
    assert 2.3 <= 100 * wrong / made <= 7.7  # three standard errors


def evidence(slug: str, total: np.ndarray | None, **fields: object) -> ArmEvidence:
    arm = RunArm(
        **{
            **{"slug": slug, "kind": "bf16", "merge_base": None, "scheme": None, "quantization": None},
            **{"on_base": False, "model": None, "adapter": None, "evaluate": None, "measure": None},
            **fields,
        }  # type: ignore[arg-type]
    )
    return ArmEvidence(arm=arm, failure=None, scores={} if total is None else {"task": scores(total)}, kl=None)


def a_run(*, gained: int = 200) -> dict[str, ArmEvidence]:
    arms = [
        evidence("base", answers(100)),
        evidence("nf4-adapter", answers(100 + gained)),
        evidence("merged-dequantized", answers(100 + gained), merge_base="dequantized"),
        evidence("gptq-w4-g128", answers(100 + gained, lost=10), merge_base="dequantized", scheme="gptq-w4-g128"),
        evidence("awq-w4-g128", None, merge_base="dequantized", scheme="awq-w4-g128"),
    ]
    return {one.arm.slug: one for one in arms}


def test_the_report_has_every_arm_that_could_keep_some_of_it() -> None:
    made = kept(a_run(), DRAWS)
    assert made is not None and made["task"]["gain"] == 0.5 and made["task"]["reason"] is None
    shares = made["task"]["arms"]
    assert {slug: line["share"] for slug, line in shares.items()} == {
        "merged-dequantized": 1.0,
        "gptq-w4-g128": pytest.approx(0.95),
        "awq-w4-g128": None,
    }
    assert shares["awq-w4-g128"]["reason"] == "no such scores" and "loss" not in made
    shown = {row[0]: row[1] for row in rows(made)}
    assert shown["gptq-w4-g128"].startswith("95.0 % [9") and shown["awq-w4-g128"] == "–"
    assert reasons(made) == ["awq-w4-g128, task score: no such scores."]
    assert "From base to nf4-adapter: task score +50.0 [" in lead(made)


@pytest.mark.parametrize("gained", [2, 0, -60])
def test_where_no_gain_is_shown_there_is_no_share_of_it(gained: int) -> None:
    made = kept(a_run(gained=gained), DRAWS)
    assert made is not None
    assert made["task"]["reason"] == NOT_SHOWN and made["task"]["arms"] == {} and rows(made) == []
    assert NOT_SHOWN in lead(made)


def test_a_run_without_base_or_schemes_has_no_such_section() -> None:
    arms = a_run()
    assert kept({slug: one for slug, one in arms.items() if slug != "base"}, DRAWS) is None
    assert kept({slug: arms[slug] for slug in ("base", "nf4-adapter")}, DRAWS) is None
    failed = {slug: replace(one, failure="out of memory") if one.arm.merge_base else one for slug, one in arms.items()}
    assert kept(failed, DRAWS) is None
