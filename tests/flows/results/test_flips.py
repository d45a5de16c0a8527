"""Answers lost and gained are counted by hand, McNemar's p is the book's, and what cannot be counted says why."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import comb

import numpy as np
import pytest

from flows.gate.checks import Check, PlannedCheck, judge
from flows.results.cells import Draws
from flows.results.comparisons import compare
from flows.results.flips import GRADED, SUMMED, Flips, flips, flips_json, flips_text, mcnemar, swapped_flips
from flows.results.paired import Paired
from flows.results.rows import RowScores
from tests.flows.paths import arm


def answers(right: str, *, count: float = 1.0, group: int = 1) -> RowScores:
    """A row a letter, `1` where it is right; so many in a group."""
    names = np.asarray([f"{index:04d}" for index in range(len(right))])
    groups = np.asarray([f"{index // group:04d}" for index in range(len(right))])
    total = np.asarray([float(letter) for letter in right])
    return RowScores(names, groups, np.full(len(right), ""), total, np.full(len(right), count))


def test_the_counts_are_those_of_the_rows() -> None:
    b = answers("1111100000")
    a = answers("1100011000")
    assert flips(Paired(a, b, "share")) == Flips(lost=3, gained=2, p=1.0)
    assert flips(Paired(b, a, "share")) == Flips(lost=2, gained=3, p=1.0)
    assert flips(Paired(a, a, "share")) == Flips(lost=0, gained=0, p=1.0)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(4, 0, 0.125), (9, 0, 2 / 2**9), (5, 15, 0.041389), (0, 6, 0.03125), (7, 7, 1.0)],  # sign test's tables
)
def test_p_is_the_exact_one(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-4)
    n, fewer = lost + gained, min(lost, gained)
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n))


def test_the_interval_and_mcnemar_agree_where_a_row_is_a_group() -> None:
    """At 400 rows both call 6 lost and none gained nearly different, and more of them different."""
    rows = 400
    for lost in range(4, 12):
        b = answers("1" * rows)
        a = answers("0" * lost + "1" * (rows - lost))
        planned = PlannedCheck(metric="task", source="task", against="b", margin=0.02, a=a, b=b)
        (check,) = judge([planned], Draws())
        assert check.ci95 is not None and check.flips is not None
        if check.flips["p"] < 0.01:
            assert check.ci95.high < 0
        if check.flips["p"] > 0.1:
            assert check.ci95.high >= 0


def test_graded_and_summed_scores_have_none_and_say_why() -> None:
    half = answers("1010")
    graded = RowScores(half.rows, half.group, half.domain, half.total * 0.5, half.count)
    assert flips(Paired(graded, half, "share")) == GRADED
    assert flips(Paired(answers("1010", count=3.0), answers("1111", count=3.0), "share")) == SUMMED
    assert flips_json(Paired(graded, half)) == {"lost": None, "gained": None, "p": None, "reason": GRADED}
    assert flips_text(flips_json(Paired(graded, half))) == ""


def test_words_say_which_way_and_never_more_than_is_known() -> None:
    line = flips_json(Paired(answers("1100011000"), answers("1111100000")))
    assert flips_text(line) == "3 answers lost, 2 gained, p = 1"
    assert flips_text(swapped_flips(line)) == "2 answers lost, 3 gained, p = 1"
    assert flips_text(flips_json(Paired(answers("0111"), answers("1111")))) == "1 answer lost, 0 gained, p = 1"
    assert flips_text(flips_json(Paired(answers("01"), answers("01")))) == "no answer flipped"
    many = flips_json(Paired(answers("0" * 40), answers("1" * 40)))
    assert flips_text(many) == "40 answers lost, 0 gained, p < 0.0001"
    assert flips_text(None) == "" and swapped_flips(None) is None


def test_every_comparison_of_a_task_has_them_and_no_other() -> None:
    tuned, base = answers("1" * 60 + "0" * 40), answers("1" * 20 + "0" * 80)
    losses = {name: answers("1" * 100) for name in ("nf4-adapter", "base")}
    scores = {
        "nf4-adapter": {"task": tuned, "nll": losses["nf4-adapter"], "task.graded": tuned.zeros()},
        "base": {"task": base, "nll": losses["base"], "task.graded": replace(base, total=base.total / 3)},
    }
    made, _ = compare([arm("nf4-adapter"), arm("base")], scores, Draws())
    by_metric = {one.metric: one for one in made}
    assert by_metric["task"].flips == {"lost": 0, "gained": 40, "p": pytest.approx(2 / 2**40), "reason": None}
    assert by_metric["task"].as_dict()["flips"]["gained"] == 40
    assert by_metric["task.graded"].flips == {"lost": None, "gained": None, "p": None, "reason": GRADED}
    assert by_metric["ppl_test"].flips is None


def test_the_gate_says_them_and_reads_what_was_judged_without() -> None:
    a, b = answers("0" * 3 + "1" * 397), answers("1" * 395 + "0" * 5)
    planned = PlannedCheck(metric="task", source="task", against="champion", margin=0.02, a=a, b=b)
    (check,) = judge([planned], Draws())
    line = check.as_dict()
    assert line["flips"]["lost"] == 3 and line["flips"]["gained"] == 5
    assert "(3 answers lost, 5 gained, p = 0.73)" in line["text"]
    assert Check.of(line).flips == check.flips
    older = {name: value for name, value in line.items() if name != "flips"}
    assert Check.of(older).flips is None and "answers lost" not in Check.of(older).as_dict()["text"]
    loss = PlannedCheck(metric="loss", source="nll", against="champion", margin=0.02, a=a, b=b)
    assert judge([loss], Draws())[0].flips is None


def test_rows_of_one_group_make_p_too_small_and_the_interval_wider() -> None:
    """Ten copies of every row: p falls a thousandfold, the interval does not move."""
    b, a = "1" * 60, "0" * 5 + "1" * 55
    alone = [answers(one) for one in (a, b)]
    copied = [answers("".join(letter * 10 for letter in one), group=10) for one in (a, b)]
    p = [flips(Paired(*pair)).p for pair in (alone, copied)]  # type: ignore[union-attr]
    assert p[0] > 0.05 > 1e-9 > p[1]
    intervals = []
    for pair in (alone, copied):
        planned = PlannedCheck(metric="task", source="task", against="b", margin=0.02, a=pair[0], b=pair[1])
        intervals.append(judge([planned], Draws())[0].ci95)
    assert all(first == pytest.approx(second) for first, second in pairwise(intervals))
