"""The verdict on what an engine serves: noise passes, a change of weights does not, few rows are undecided.

False alarms, `python -m tests.flows.results.test_served_checks 400`: 400 runs, each with a floor and four arms whose
noise is the floor's (Student's t with 5 degrees of freedom; standard deviation of a row in nats a token). Per cent of
the 1,600 arms that differ / are undecided:

| noise, answers changed | 50 rows | 100 | 300 | 714 |
| --- | --- | --- | --- | --- |
| 0.002 nats, 1 % | 0 / 37.5 | 0 / 6.4 | 0 / 0 | 0 / 0 |
| 0.002 nats, 4 % | 0 / 53 | 0 / 14 | 0 / 0 | 0 / 0 |
| 0.006 nats, 4 % | 0 / 84 | 0.06 / 35 | 0 / 4.1 | 0 / 0.4 |
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from flows.results.cells import Draws
from flows.results.rows import RowScores
from flows.results.served_checks import BAND, Judged, ServedScores, judge_served, verdict_of

FLOOR = "merged-dequantized"
DRAWS = Draws()
AS_MEASURED, DIFFERS, UNDECIDED = "served as measured", "differs by more than the floor", "undecided"
TOKENS = 25.0


def rows(total: np.ndarray, count: float = 1.0, *, first: int = 0) -> RowScores:
    """Scores of rows that are groups of their own."""
    names = np.asarray([f"{first + index:05d}" for index in range(len(total))])
    counts = np.full(len(total), count)
    return RowScores(names, names, np.full(len(total), ""), np.asarray(total, dtype=float), counts)


class Engines:
    """Rows of one test set, and what an engine makes of them."""

    def __init__(self, n: int, seed: int) -> None:
        self.rng = np.random.default_rng([seed, n])
        self.loss = self.rng.gamma(0.5, 0.1, n) * TOKENS
        self.n = n

    def noise(self, size: float = 0.002) -> np.ndarray:
        """[rows] nats: heavy tails, mean zero, standard deviation `size` a token."""
        return size * TOKENS * self.rng.standard_t(5, self.n) * np.sqrt(3 / 5)

    def arm(self, off: np.ndarray, *, changed: float | np.ndarray | None = 0.01) -> ServedScores:
        """An arm whose rows are `off` by so many nats, and some of its answers changed."""
        served = {"served_nll": rows(np.asarray(self.loss + off), TOKENS)}
        if changed is not None:
            flips = self.rng.random(self.n) < changed if isinstance(changed, float) else changed
            served["served_equal"] = rows(np.where(flips, 0.0, 1.0))
        return ServedScores(served, {"nll": rows(self.loss, TOKENS)})

    def judged(self, arm: ServedScores, floor: ServedScores | None) -> tuple[str, dict[str, str], Judged]:
        """Verdict of an arm, and the outcome of each check."""
        found = judge_served({"arm": arm} | ({FLOOR: floor} if floor else {}), FLOOR, DRAWS)
        checks = found.checks["arm"]
        return verdict_of(checks), {check.name: check.outcome for check in checks}, found


@pytest.fixture
def engines() -> Engines:
    return Engines(714, seed=1)


# ---- noise


def test_noise_like_the_floors_is_served_as_measured(engines: Engines) -> None:
    verdict, checks, found = engines.judged(engines.arm(engines.noise()), engines.arm(engines.noise()))
    assert (verdict, found.floor, found.no_floor) == (AS_MEASURED, FLOOR, None)
    assert checks == {"loss": "pass", "rows": "pass", "answers": "pass"}
    assert verdict_of(found.checks[FLOOR]) == AS_MEASURED and len(found.checks[FLOOR]) == 1


def test_a_kernel_that_rounds_once_more_is_served_as_measured(engines: Engines) -> None:
    """1.2 times the floor's noise; 1.41 is the most that one more rounding of the same size makes."""
    arm = engines.arm(1.2 * engines.noise(), changed=0.015)
    assert engines.judged(arm, engines.arm(engines.noise()))[0] == AS_MEASURED


def test_engines_that_agree_exactly_leave_room_for_the_last_digit(engines: Engines) -> None:
    exact = engines.arm(np.zeros(714), changed=np.zeros(714))
    assert engines.judged(exact, exact)[0] == AS_MEASURED
    assert engines.judged(engines.arm(engines.noise(0.00008), changed=np.zeros(714)), exact)[0] == AS_MEASURED
    verdict, checks, _ = engines.judged(engines.arm(engines.noise(0.0004), changed=np.zeros(714)), exact)
    assert (verdict, checks["rows"]) == (DIFFERS, "differs")


@pytest.mark.parametrize(("changed", "total"), [(8, 714), (13, 298)])
def test_what_was_seen_in_vllm_is_served_as_measured(changed: int, total: int) -> None:
    """The quickstart (706 of 714 answers equal) and SmolLM2-135M (285 of 298); an arm has two changed answers more."""
    engines = Engines(total, seed=3)
    flips = np.arange(total)
    floor = engines.arm(engines.noise(), changed=flips < changed)
    arm = engines.arm(engines.noise(), changed=flips >= total - changed - 2)
    assert engines.judged(arm, floor)[0] == AS_MEASURED


# ---- what is no noise


@pytest.mark.parametrize(("bias", "verdict"), [(0.0002, AS_MEASURED), (0.0015, DIFFERS), (-0.0015, DIFFERS)])
def test_a_bias_beyond_the_band_differs(engines: Engines, bias: float, verdict: str) -> None:
    found, checks, _ = engines.judged(engines.arm(engines.noise() + bias * TOKENS), engines.arm(engines.noise()))
    assert found == verdict
    assert checks["loss"] == ("pass" if verdict == AS_MEASURED else "differs")


def test_a_damaged_layer_that_helps_as_much_as_it_hurts_differs_by_its_rows(engines: Engines) -> None:
    """No mean at all: 0.004 nats a token up or down, where rounding makes 0.002."""
    damage = 0.004 * TOKENS * np.where(np.arange(714) % 2, 1.0, -1.0)
    verdict, checks, _ = engines.judged(engines.arm(engines.noise() + damage), engines.arm(engines.noise()))
    assert (verdict, checks["loss"], checks["rows"]) == (DIFFERS, "pass", "differs")


def test_damage_on_a_part_of_the_rows_differs(engines: Engines) -> None:
    """A tenth of the rows is off by 0.03 nats a token, up and down: one domain's words."""
    hit = np.where(np.arange(714) % 20 < 2, np.where(np.arange(714) % 2, 0.03, -0.03), 0.0) * TOKENS
    verdict, checks, _ = engines.judged(engines.arm(engines.noise() + hit), engines.arm(engines.noise()))
    assert (verdict, checks["rows"]) == (DIFFERS, "differs")


def test_a_broken_decoder_is_seen_by_its_answers_alone(engines: Engines) -> None:
    verdict, checks, _ = engines.judged(engines.arm(engines.noise(), changed=0.3), engines.arm(engines.noise()))
    assert (verdict, checks) == (DIFFERS, {"loss": "pass", "rows": "pass", "answers": "differs"})


def test_losses_that_are_not_finite_are_no_pass(engines: Engines) -> None:
    off = engines.noise()
    off[5] = np.nan
    verdict, checks, found = engines.judged(engines.arm(off), engines.arm(engines.noise()))
    assert (verdict, checks["loss"]) == (UNDECIDED, "undecided")
    assert found.checks["arm"][0].reason == "1 rows have no finite score"


# ---- few rows, no floor


@pytest.mark.parametrize("n", [10, 30])
def test_few_rows_are_undecided(n: int) -> None:
    engines = Engines(n, seed=2)
    arm, floor = (engines.arm(engines.noise(), changed=np.zeros(n)) for _ in range(2))
    assert engines.judged(arm, floor)[0] == UNDECIDED


@pytest.mark.parametrize(("n", "outcome"), [(35, "undecided"), (36, "pass")])
def test_answers_say_something_from_36_rows_on(n: int, outcome: str) -> None:
    """No answer changed: 1 - 0.025 ** (1 / 36) = 0.0974 is excluded, 0.1001 at 35 is not."""
    engines = Engines(n, seed=2)
    arm, floor = (engines.arm(np.zeros(n), changed=np.zeros(n)) for _ in range(2))
    assert engines.judged(arm, floor)[1]["answers"] == outcome


def test_plain_texts_have_no_answers_and_are_judged_by_their_losses(engines: Engines) -> None:
    arm, floor = (engines.arm(engines.noise(), changed=None) for _ in range(2))
    verdict, checks, _ = engines.judged(arm, floor)
    assert (verdict, set(checks)) == (AS_MEASURED, {"loss", "rows"})


def test_without_a_floor_the_band_alone_decides(engines: Engines) -> None:
    verdict, checks, found = engines.judged(engines.arm(engines.noise(), changed=0.3), None)
    assert (verdict, checks, found.no_floor) == (AS_MEASURED, {"loss": "pass"}, f"{FLOOR} was not served")
    assert found.checks["arm"][0].limit == BAND
    assert engines.judged(engines.arm(engines.noise() + 0.001 * TOKENS), None)[0] == DIFFERS


def test_a_floor_that_differs_excuses_nothing(engines: Engines) -> None:
    """An engine that computes this architecture wrongly, in bf16 as in four bits: everything differs."""
    floor, arm = (engines.arm(engines.noise() + 0.05 * TOKENS) for _ in range(2))
    verdict, checks, found = engines.judged(arm, floor)
    assert (verdict, set(checks), found.floor) == (DIFFERS, {"loss"}, None)
    assert found.no_floor == f"{FLOOR} is no floor: the engine gives another loss than its own evaluation"
    assert verdict_of(found.checks[FLOOR]) == DIFFERS


def test_only_rows_that_both_have_are_compared(engines: Engines) -> None:
    """The engine served the last 700 rows; of the others nothing is said."""
    arm, floor = engines.arm(engines.noise()), engines.arm(engines.noise())
    fewer = ServedScores({name: one.where(np.arange(714) >= 14) for name, one in arm.served.items()}, arm.own)
    verdict, _, found = engines.judged(fewer, floor)
    assert verdict == AS_MEASURED and {check.n for check in found.checks["arm"]} == {700}
    elsewhere = ServedScores({"served_nll": rows(engines.loss, TOKENS, first=2000)}, arm.own)
    assert engines.judged(elsewhere, floor)[0] == UNDECIDED


# ---- false alarms


def alarms(n: int, changed: float, *, runs: int, seed: int, size: float = 0.002, arms: int = 4) -> Counter[str]:
    """Verdicts of arms whose noise is the floor's, over many runs."""
    verdicts: Counter[str] = Counter()
    for run in range(runs):
        engines = Engines(n, seed=seed + run)
        served = {slug: engines.arm(engines.noise(size), changed=changed) for slug in (FLOOR, *map(str, range(arms)))}
        found = judge_served(served, FLOOR, DRAWS)
        verdicts.update(verdict_of(found.checks[slug]) for slug in served if slug != FLOOR)
    return verdicts


def test_equal_noise_is_no_alarm() -> None:
    """25 runs of 150 rows, 100 arms: none differs (0.0 % above); undecided are 3 in 100 at most."""
    found = alarms(150, 0.01, runs=25, seed=100)
    assert found[DIFFERS] == 0 and found[UNDECIDED] <= 3, found


if __name__ == "__main__":
    for noise, share in ((0.002, 0.01), (0.002, 0.04), (0.006, 0.04)):
        for length in (50, 100, 300, 714):
            every = alarms(length, share, size=noise, runs=int(sys.argv[1]), seed=0)
            told = ", ".join(f"{word} {100 * every[word] / every.total():.2f}" for word in (DIFFERS, UNDECIDED))
            print(f"{noise} nats, {100 * share:g} %, {length} rows: {told}", flush=True)
