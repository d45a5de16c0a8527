"""The gate on planted regressions, its three outcomes, and how often it is wrong on simulated arms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flows.gate.checks import DOMAIN_ROWS, PlannedCheck, better_than_base, judge, planned_checks, restricted
from flows.gate.section import gate_of
from flows.results.cells import ArmEvidence, Draws, gather
from flows.results.read import Run, read_run
from flows.results.rows import RowScores
from recipes.schema import Gate
from tests.flows.synthetic_run import SHAPES, SyntheticRun

Scores = dict[str, RowScores]
GATE = Gate()
ARM = "gptq-w4-g128"
DRAWS = Draws()


def rows(total: np.ndarray, count: np.ndarray | None = None, *, domain: np.ndarray | None = None) -> RowScores:
    """Scores of rows that are groups of their own."""
    names = np.asarray([f"{index:06d}" for index in range(len(total))])
    count = np.ones(len(total)) if count is None else count
    domain = np.full(len(total), "") if domain is None else domain
    return RowScores(names, names, domain, np.asarray(total, dtype=float), count.astype(float))


def question(a: np.ndarray, b: np.ndarray, *, margin: float, task: bool = True) -> PlannedCheck:
    metric, source = ("task", "task") if task else ("loss", "nll")
    return PlannedCheck(metric=metric, source=source, against="other", margin=margin, a=rows(a), b=rows(b))


def one(a: np.ndarray, b: np.ndarray, *, margin: float = 0.02, task: bool = True) -> Any:
    return judge([question(a, b, margin=margin, task=task)], DRAWS)[0]


# ---- three outcomes


def test_equal_answers_on_enough_rows_pass_and_on_few_are_undecided() -> None:
    right = np.ones(1000)
    right[:200] = 0
    assert one(right, right).outcome == "pass"
    few = one(right[:150], right[:150])
    assert (few.outcome, few.difference) == ("undecided", 0.0)
    # Of 238 rows 2 points are 4.76, whose standard error is 2.16; Student's t of it and half a row are as much.
    assert few.n_needed == pytest.approx(238, abs=2)
    assert [one(right[:n], right[:n]).outcome for n in (237, 238)] == ["undecided", "pass"]


def test_what_is_lost_beyond_the_margin_is_worse_and_a_gain_is_not() -> None:
    right = np.ones(1000)
    wrong = right.copy()
    wrong[:80] = 0
    assert one(wrong, right).outcome == "worse"
    assert one(right, wrong).outcome == "pass"
    assert one(right + 0.1, right, margin=0.02, task=False).outcome == "worse"  # a loss: lower is better
    assert one(right - 0.1, right, margin=0.02, task=False).outcome == "pass"


def test_a_check_says_how_many_rows_would_decide() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random(400) < 0.8
    flipped = rng.random(400) < 0.05
    found = one(truth ^ flipped, truth)
    assert found.outcome == "undecided" and found.n == 400
    assert f"400 rows, about {found.n_needed:,} would decide" in found.as_dict()["text"]


def test_rows_needed_decide_four_times_in_five() -> None:
    """Loss +0.004 of 0.02 allowed, sd 0.15 a row: n_needed from one exact sample, then 400 trials of that size."""
    rng = np.random.default_rng(5)

    def pair(n: int) -> tuple[np.ndarray, np.ndarray]:
        shared = rng.gamma(2, 0.3, n)
        return shared + 0.004 + rng.normal(0, 0.15, n), shared

    first = rng.gamma(2, 0.3, 250)
    apart = rng.normal(0, 1, 250)
    apart = 0.004 + 0.15 * (apart - apart.mean()) / apart.std()
    found = one(first + apart, first, task=False)
    assert found.outcome == "undecided" and found.n_needed is not None
    questions = [question(*pair(found.n_needed), margin=0.02, task=False) for _ in range(400)]
    # `pass` is each check's own: what the other 399 say does not enter.
    passed = np.mean([check.outcome == "pass" for check in judge(questions, DRAWS)])
    assert 0.74 < passed < 0.86, passed  # 0.80, standard error 0.02


def test_a_model_at_the_margin_passes_in_one_of_forty() -> None:
    """Exactly as much is lost as may be: 1,000 trials, where 2.5 % is meant (standard error 0.5)."""
    rng = np.random.default_rng(7)
    shared = rng.gamma(2, 0.3, (1000, 200))
    at_margin = shared + 0.02 + rng.normal(0, 0.1, shared.shape)
    questions = [question(a, b, margin=0.02, task=False) for a, b in zip(at_margin, shared, strict=True)]
    passed = np.mean([check.outcome == "pass" for check in judge(questions, DRAWS)])
    assert 0.01 <= passed <= 0.04, passed


def test_better_than_base_needs_an_interval_above_zero() -> None:
    right, base = np.ones(500), np.ones(500)
    base[:3] = 0
    task = {"task": rows(right)}
    assert judge([better_than_base(task, {"task": rows(base)})], DRAWS)[0].outcome == "undecided"
    base[:30] = 0
    assert judge([better_than_base(task, {"task": rows(base)})], DRAWS)[0].outcome == "pass"
    plain = better_than_base({"nll": rows(right)}, {"nll": rows(right + 1)})  # plain text: no prompt, so the loss
    assert (plain.metric, judge([plain], DRAWS)[0].outcome) == ("loss", "pass")


def test_further_scorers_gate_as_the_first_one_does() -> None:
    right = np.ones(400)
    wrong = right.copy()
    wrong[:60] = 0
    own = {"task": rows(right), "task.valid": rows(wrong), "nll": rows(right)}
    other = {"task": rows(right), "task.valid": rows(right), "nll": rows(right)}
    found = {check.metric: check.outcome for check in judge(list(planned_checks(own, other, "merged", GATE)), DRAWS)}
    assert found == {"task": "pass", "task.valid": "worse", "loss": "pass"}


def test_only_slices_of_200_rows_gate() -> None:
    domain = np.asarray(["large"] * DOMAIN_ROWS + ["small"] * (DOMAIN_ROWS - 1) + ["rest"] * 600)
    right = np.ones(len(domain))
    wrong = np.where(domain == "small", 0.0, right)
    own, other = ({"task": rows(score, domain=domain), "nll": rows(right, domain=domain)} for score in (wrong, right))
    found = {
        (check.metric, check.domain): check for check in judge(list(planned_checks(own, other, "merged", GATE)), DRAWS)
    }
    assert found["task", "small"].outcome == "worse" and not found["task", "small"].gates
    assert found["task", "large"].outcome == "pass" and found["task", "large"].gates
    assert "shown only" in found["task", "small"].as_dict()["text"]


def test_a_model_that_reads_other_tokens_is_compared_by_bits_with_the_same_margin() -> None:
    """0.018 nats a token of 0.02 that may be lost; 10 tokens are 40 bytes."""
    tokens, size, right = np.full(500, 10.0), np.full(500, 40.0), np.ones(500)
    loss = np.random.default_rng(2).gamma(2, 0.3, 500)
    own = {"task": rows(right), "nll": rows(10 * (loss + 0.018), tokens), "nll_general": rows(right)}
    own["bits"] = rows(10 * (loss + 0.018) / np.log(2), size)
    theirs = {"task": rows(right), "bits": rows(10 * loss / np.log(2), size)}
    found = {check.metric: check for check in judge(list(planned_checks(own, theirs, "champion", GATE)), DRAWS)}
    assert set(found) == {"task", "bits_per_byte"}
    bits = found["bits_per_byte"]
    assert bits.margin == pytest.approx(0.02 * 10 / 40 / np.log(2))
    assert bits.difference == pytest.approx(0.018 * 10 / 40 / np.log(2))
    assert (bits.unit, bits.outcome) == ("bits", "pass")
    assert "bits a byte against champion" in bits.as_dict()["text"]


def test_rows_that_are_left_out_leave_both_sides() -> None:
    scores = {"task": rows(np.arange(5.0)), "nll_general": rows(np.ones(5))}
    less = restricted(scores, frozenset({"000001", "000003"}))
    assert list(less["task"].total) == [0, 2, 4]
    assert len(less["nll_general"].rows) == 5


# ---- planted regressions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """2,000 rows in seven domains; gptq-w4-g128 is as good as the merged model."""
    home = tmp_path_factory.mktemp("home")
    shapes = {name: SHAPES[name] for name in ("base", "nf4-adapter", "merged-dequantized", "merged-original")}
    shapes[ARM] = replace(SHAPES[ARM], task=0.905)
    folder = SyntheticRun(home, shapes=shapes, test=2000, general=400).write()
    found = read_run(folder, home)
    return replace(found, recipe={**found.recipe, "promote": {"prefer": ARM}})


def gated(run: Run, evidence: dict[str, ArmEvidence]) -> dict[str, Any]:
    return gate_of(run, evidence, DRAWS)


def more_loss(
    share: float, *, of_rows: float = 1.0, metric: str = "nll", domain: str = ""
) -> Callable[[Scores], Scores]:
    """`share` nats a token more on some of the rows."""

    def damage(scores: Scores) -> Scores:
        old = scores[metric]
        hit = (np.arange(len(old.rows)) < of_rows * len(old.rows)) & ((old.domain == domain) | (domain == ""))
        return {**scores, metric: replace(old, total=old.total + share * old.count * hit)}

    return damage


def wrong_answers(share: float, *, domain: str = "") -> Callable[[Scores], Scores]:
    """A share of the right answers is wrong."""

    def damage(scores: Scores) -> Scores:
        old = scores["task"]
        hit = (np.random.default_rng(1).random(len(old.rows)) < share) & ((old.domain == domain) | (domain == ""))
        return {**scores, "task": replace(old, total=np.where(hit, 0.0, old.total))}

    return damage


def broken(value: float, metric: str = "nll") -> Callable[[Scores], Scores]:
    """One row has no finite score."""

    def damage(scores: Scores) -> Scores:
        total = scores[metric].total.copy()
        total[3] = value
        return {**scores, metric: replace(scores[metric], total=total)}

    return damage


def without_row(scores: Scores) -> Scores:
    return {name: one.where(np.arange(len(one.rows)) > 0) for name, one in scores.items()}


def without(metric: str) -> Callable[[Scores], Scores]:
    return lambda scores: {name: one for name, one in scores.items() if name != metric}


def fewer_tokens(scores: Scores) -> Scores:
    """Scored without the last token of each row."""
    return {**scores, "nll": replace(scores["nll"], count=scores["nll"].count - 1)}


DAMAGES: dict[str, Callable[[Scores], Scores]] = {
    "loss +0.03": more_loss(0.03),
    "loss +0.05": more_loss(0.05),
    "loss +0.3": more_loss(0.3),
    "loss +3": more_loss(3.0),
    "a tenth of the rows loses 0.5": more_loss(0.5, of_rows=0.1),
    "one row in fifty loses 4": more_loss(4.0, of_rows=0.02),
    "general loss +0.08": more_loss(0.08, metric="nll_general"),
    "general loss +0.2": more_loss(0.2, metric="nll_general"),
    "general loss +2": more_loss(2.0, metric="nll_general"),
    "loss +0.1 in one domain": more_loss(0.1, domain="join"),
    "5 % wrong": wrong_answers(0.05),
    "8 % wrong": wrong_answers(0.08),
    "20 % wrong": wrong_answers(0.2),
    "half wrong": wrong_answers(0.5),
    "all wrong, as the base": wrong_answers(1.0),
    "15 % wrong in one domain": wrong_answers(0.15, domain="join"),
    "a loss that is NaN": broken(float("nan")),
    "a loss that is infinite": broken(float("inf")),
    "a row is missing": without_row,
    "no task score": without("task"),
    "no general loss": without("nll_general"),
    "fewer tokens": fewer_tokens,
}


def test_the_undamaged_arm_passes(run: Run) -> None:
    found = gated(run, gather(run))
    assert (found["candidate"], found["outcome"]) == (ARM, "pass"), found["text"]
    assert all(check["outcome"] == "pass" for check in (*found["tests"], *found["domains"]) if check["gates"])
    assert any(check["gates"] for check in found["domains"])


def test_planted_regressions_are_blocked(run: Run) -> None:
    evidence = gather(run)
    blocked = {}
    for name, damage in DAMAGES.items():
        hurt = {**evidence, ARM: replace(evidence[ARM], scores=damage(dict(evidence[ARM].scores)))}
        found = gated(run, hurt)
        blocked[name] = found["outcome"]
        assert f"{ARM} does not pass the gate" in found["text"][0], name
    assert len(blocked) >= 20
    assert set(blocked.values()) <= {"worse", "undecided"}, blocked
    assert [blocked[name] for name in ("loss +3", "all wrong, as the base", "general loss +2")] == ["worse"] * 3


def test_an_arm_that_failed_is_blocked_and_said(run: Run) -> None:
    evidence = gather(run)
    gone = {**evidence, "merged-dequantized": replace(evidence["merged-dequantized"], failure="lost", scores={})}
    found = gated(run, gone)
    assert found["outcome"] == "undecided"
    assert any("merged-dequantized has no such scores" in line for line in found["text"])
