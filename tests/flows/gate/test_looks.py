"""Looks: what counts as one, what each may spend, and the words for it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from flows.gate.checks import Check, judge
from flows.gate.looks import Judged, Looks, level_text, looks_of, ordinal
from flows.results.cells import Draws
from flows.results.draws import draw
from flows.results.stats import LEVEL, Estimand, Sums, critical_of, difference_intervals, studentized
from tests.flows.gate.test_checks import question

ROWS = tuple(f"{number:04d}" for number in range(400))


def verdict(version: int, rows: tuple[str, ...] | None = ROWS, digest: str = "", number: int | None = None) -> Judged:
    return Judged(version, digest or f"digest {version}", None if rows is None else frozenset(rows), number)


def look(digest: str, before: list[Judged], rows: tuple[str, ...] = ROWS, limit: int = 52) -> Looks:
    return looks_of(digest, rows, before, limit=limit)


@pytest.mark.parametrize("limit", [1, 2, 12, 52, 520])
def test_all_looks_together_spend_five_percent(limit: int) -> None:
    every = [Looks(number=number, limit=limit) for number in range(1, limit + 1)]
    assert every[0].level == pytest.approx(LEVEL) and every[0].spent == 0.025
    assert sum(one.alpha for one in every) == pytest.approx(0.025 if limit == 1 else 0.05)
    assert [one.spent for one in every] == pytest.approx(list(np.cumsum([one.alpha for one in every])))
    assert not any(one.spent_out for one in every)
    beyond = Looks(number=limit + 1, limit=limit)
    assert beyond.spent_out and beyond.spent == pytest.approx(every[-1].spent)
    assert "undecided" in beyond.as_dict()["text"] and "data.salt" in beyond.as_dict()["text"]


def test_decisions_on_the_same_rows_are_counted() -> None:
    before = [verdict(1), verdict(2)]
    assert look("digest 3", before) == Looks(number=3, limit=52, versions=(1, 2))
    assert look("digest 3", []) == Looks(number=1, limit=52)
    assert look("digest 3", before).as_dict()["text"] == (
        "The 3rd candidate judged on these rows of test; decided at 99.9 %."
    )


def test_the_same_candidate_on_the_same_rows_keeps_its_number() -> None:
    before = [verdict(1, number=1), verdict(2, number=2), verdict(3, number=3)]
    assert look("digest 2", before) == Looks(number=2, limit=52, versions=(1,))
    assert look("digest 4", [*before, verdict(2)]).number == 4  # and is counted once


def test_the_same_candidate_on_a_few_rows_more_is_a_new_look() -> None:
    """Otherwise the same bytes, judged every day while rows come, would pass in the end."""
    more = (*ROWS, "new")
    assert look("digest 1", [verdict(1, number=1)], more).number == 2


def test_a_test_set_is_new_when_more_than_half_of_it_is() -> None:
    before = [verdict(1), verdict(2)]
    salt = (*ROWS[:60], *(f"other {number}" for number in range(340)))  # another salt leaves 15 % in common
    assert look("digest 3", before, salt).number == 1
    grown = (*ROWS, *(f"since {number}" for number in range(400)))
    assert look("digest 3", before, grown).number == 3
    assert look("digest 3", before, (*grown, "one more")).number == 1


def test_decisions_without_a_record_of_their_rows_are_said_and_not_counted() -> None:
    looks = look("digest 3", [verdict(1, None), verdict(2)])
    assert (looks.number, looks.versions, looks.unknown) == (2, (2,), 1)
    assert "Not counted: 1 earlier decision without a record of their rows." in looks.as_dict()["text"]
    assert Looks.of(looks.as_dict()) == looks


def test_words() -> None:
    assert [ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 52, 111, 1001)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "52nd", "111th", "1,001st"]
    )
    assert [level_text(level) for level in (0.95, 0.975, 1 - 0.025 / 25.5, 0.99, 1 - 1e-4)] == (
        ["95 %", "97.5 %", "99.9 %", "99 %", "99.99 %"]
    )


# ---- intervals at other levels


def test_an_interval_at_a_level_is_never_narrower_than_the_normal_one() -> None:
    rng = np.random.default_rng(5)
    boot = studentized(
        [Estimand(Sums(rng.normal(0, 1, 300), np.ones(300)), Sums(np.zeros(300), np.ones(300)))], draw(300)
    )
    widths = []
    for level in (LEVEL, 0.99, 0.999, 0.9999, 1 - 1e-6):
        (interval,) = difference_intervals(boot, level=level)
        half = (interval.high - interval.low) / 2
        assert level == LEVEL or half >= critical_of(level) * boot[0].se * (1 - 1e-9)
        widths.append(half)
    assert (
        widths == sorted(widths) and widths[-1] > widths[-2]
    )  # 10,000 resamples end at 99.98 %, the interval does not
    assert widths[2] / boot[0].se == pytest.approx(3.29, rel=0.1)


def _even(rows: int, number: int) -> Check:
    """The check at a look where no answer changed."""
    right = np.ones(rows)
    return judge([question(right, right, margin=0.02)], Draws(), level=Looks(number=number, limit=52).level)[0]


def test_no_discordant_row_leaves_more_open_at_a_higher_level() -> None:
    first, later = (_even(300, number) for number in (1, 2))
    assert first.outcome == "pass" and later.outcome == "undecided" and later.ci95 == first.ci95
    assert later.ci_level is not None and later.ci_level.high > 1 - (0.025 / 51) ** (1 / 300)  # the rule of three there
    assert later.n_needed is not None and later.n_needed > 300
    told = [_even(math.ceil(share * later.n_needed), 2).outcome for share in (0.97, 1.03)]
    assert told == ["undecided", "pass"]


def test_both_outcomes_need_more_at_a_higher_level() -> None:
    wrong, right = np.ones(1000), np.ones(1000)
    wrong[:33] = 0
    check = replace(question(wrong, right, margin=0.02), margin=0.02)
    levels = [LEVEL, Looks(number=2, limit=52).level]
    assert [judge([check], Draws(), level=level)[0].outcome for level in levels] == ["worse", "undecided"]
    text = judge([check], Draws(), level=levels[1])[0].as_dict()["text"]
    assert "points at 99.9 % (33 answers lost, 0 gained" in text and "may lose 2 points: undecided" in text


def test_slices_stay_at_95_percent() -> None:
    right = np.ones(300)
    whole = question(right, right, margin=0.05)
    checks = judge([whole, replace(whole, domain="join")], Draws(), level=Looks(number=2, limit=52).level)
    assert [round(check.level, 3) for check in checks] == [0.999, 0.95]
    later, slices = (check.ci_level for check in checks)
    assert later and slices and later.high > slices.high and checks[1].ci95 == checks[0].ci95
