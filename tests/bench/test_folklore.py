"""Probes on a synthetic run whose arms are known to differ, and the arithmetic by hand."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from flows.commands.audit_table import read_table
from flows.results.audit import audited
from flows.results.read import read_run
from recipes.arms import arms
from recipes.read.load import load
from tests.bench.claims import CLAIMS, kv_cache, overhead
from tests.bench.folklore import ORIGINAL, RECIPE, RESULTS, asked, page, with_claims
from tests.bench.gradient_flow import Flow
from tests.bench.gradient_flow import verdict as flow_verdict
from tests.bench.probes import Adds, Better, Equal, Evidence, Missing, Probe, Rise, Variance, verdict
from tests.bench.published import CLAIMS as PUBLISHED
from tests.bench.published import HEADING, section
from tests.flows.synthetic_run import SHAPES, SyntheticRun

RECIPES = {"dequantized": RECIPE, "original": ORIGINAL}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    home = tmp_path_factory.mktemp("home")
    shapes = {**SHAPES, "gptq-w8-g128": replace(SHAPES["merged-dequantized"], kind="quantized", scheme="gptq-w8-g128")}
    return Evidence.of(read_run(SyntheticRun(home, shapes=shapes).write(), home))


def test_a_sign_is_shown_or_refuted_by_the_interval(evidence: Evidence) -> None:
    better, worse = Better("gptq-w3-g128", "rtn-w3-g128"), Better("rtn-w3-g128", "gptq-w3-g128")
    assert (better.seen(evidence).agrees, better.seen(evidence).outcome) == (True, "shown")
    assert (worse.seen(evidence).agrees, worse.seen(evidence).outcome) == (False, "refuted")
    task = Better("rtn-w3-g128", "merged-dequantized", "task").seen(evidence)
    assert task.outcome == "refuted" and task.text.endswith("points") and "400 rows" in task.n
    assert verdict(better, [better.seen(evidence)] * 3) == (
        "as claimed in 3 of 3 seeds; shown in 3, the opposite shown in 0"
    )


def test_equality_is_never_shown(evidence: Evidence) -> None:
    same, other = Equal("gptq-w4-g32", "gptq-w4-g32"), Equal("gptq-w4-g32", "rtn-w3-g128")
    assert same.seen(evidence).outcome == "open" and same.seen(evidence).agrees is None
    assert verdict(other, [other.seen(evidence)] * 2) == "told apart in 2 of 2 seeds"


def test_a_rise_of_perplexity_is_held_against_its_range(evidence: Evidence) -> None:
    a, b = (evidence.rows(slug, "nll") for slug in ("rtn-w3-g128", "merged-dequantized"))
    percent = 100 * np.expm1((a.total.sum() - b.total.sum()) / b.count.sum())
    found = Rise("rtn-w3-g128", "merged-dequantized", 0.5 * percent, 2 * percent).seen(evidence)
    assert found.outcome == "shown" and found.text.startswith(f"{percent:+.2f} %")
    assert Rise("rtn-w3-g128", "merged-dequantized", 3 * percent, 4 * percent).seen(evidence).outcome == "refuted"
    assert Rise("rtn-w3-g128", "merged-dequantized", percent, 4 * percent).seen(evidence).outcome == "open"


def test_variances_are_read_from_the_record(evidence: Evidence) -> None:
    """The synthetic run gives attention 0.9 to 1.28 times and the FFN 1.2 times the same spread."""
    found = Variance("gptq-w4-g128").seen(evidence)
    assert found.outcome == "open" and found.agrees is False and found.n == "24 layers"
    with pytest.raises(Missing, match="no record"):
        Variance("awq-w4-g32").seen(evidence)


def test_every_claim_has_a_row_and_what_is_missing_is_said(evidence: Evidence) -> None:
    assert len(CLAIMS) == 16
    text = page({"dequantized": {0: evidence.run}}, [])
    measured = text.partition(HEADING)[0].splitlines()
    rows = [line for line in measured if line.startswith("| ") and not line.startswith(("| claim", "| ---"))]
    assert len(rows) == len(CLAIMS) and all(row.count(" | ") == 4 for row in rows)
    assert "*not measured* (awq-w4-g32: no such arm)" in text
    told = asked(Better("nf4", "rtn-w4-g128"), {"dequantized": {0: evidence}})
    assert (told.missing, told.verdict) == ({0: "nf4: no such arm"}, "not measured")


def named(probe: Probe) -> set[str]:
    match probe:
        case Variance():
            return {probe.arm}
        case Adds():
            return {slug + kv for slug in (probe.quantized, probe.plain) for kv in ("", f".{probe.kv}")}
        case _:
            return {probe.a, probe.b}


def test_the_recipes_make_every_arm_that_is_asked_about() -> None:
    made = {name: {arm.slug for arm in arms(load(path).recipe)} for name, path in RECIPES.items()}
    for probe in (one for claim in CLAIMS for one in claim.probes):
        assert named(probe) <= made[probe.merge if isinstance(probe, Better) else "dequantized"], probe.label


def test_arithmetic_by_hand() -> None:
    # 16 / 128 / 4 and 16 / 32 / 4; with 4-bit zero points 20 / 128 / 4 and 20 / 32 / 4.
    for figure in ("3.1 % (g128)", "12.5 % (g32)", "awq 3.9 %, 15.6 %"):
        assert figure in overhead()
    # 2 x 32 layers x 32 heads x 128 x 2 bytes = 524,288 bytes a token, x 4,096 x 32 = 68.7e9.
    assert "Llama 2 7B 524,288 bytes a token, 2.15 GB a sequence, 68.7 GB for 32" in kv_cache()


def test_a_lost_gradient_is_not_called_a_gradient() -> None:
    stopped, nf4 = Flow("bf16, stopped", "Linear", 0.54, None), Flow("nf4", "Linear4bit", 0.86, None)
    flows = [stopped, nf4, Flow("gptq-w4-g128", "A", 0.1, None), Flow("gptq-w4-g128", "B", 0.99, None)]
    assert flow_verdict([*flows, Flow("awq-w4-g128", "C", None, "RuntimeError: no")]) == (
        "a right gradient passes 1 of 2 other formats (gptq-w4-g128), so the claim is wrong; it is lost, without an "
        "error, in gptq-w4-g128 (A)"
    )
    assert flow_verdict([stopped, nf4]) == "not measured"


def test_the_published_figures_of_the_page_are_those_of_the_csv(evidence: Evidence) -> None:
    text = RESULTS.read_text(encoding="utf-8")
    assert text.endswith(section()) and text.count(HEADING) == 1, "python -m tests.bench.folklore --claims"
    assert with_claims(text) == text
    assert page({"dequantized": {0: evidence.run}}, []).endswith(section())


def test_every_published_claim_has_its_source_and_a_line() -> None:
    claims = audited(read_table(PUBLISHED).claims)
    with PUBLISHED.open(encoding="utf-8", newline="") as opened:
        sources = [line["source"] for line in csv.DictReader(opened)]
    assert len(claims) == len(sources) >= 10 and all(source.startswith("https://") for source in sources)
    assert section().count("\n| ") == len(claims) + 2
    assert {one.verdict.outcome for one in claims} == {"shown", "depends", "cannot"}  # all three were put to the test


def test_the_recovery_of_66_9_per_cent_is_two_of_three_questions() -> None:
    claim = audited(read_table(PUBLISHED).claims)[0]
    assert claim.recovery is not None and claim.claim.gain is not None and claim.claim.n == 198
    assert (claim.recovery.returned, claim.recovery.lost, claim.verdict.outcome) == (2, 3, "cannot")
    sizes = {"diamond": 198, "main": 448, "extended": 546}
    one_point = {name: [k for k in range(n) if round(100 * k / n, 1) == 1.0] for name, n in sizes.items()}
    assert one_point == {"diamond": [2], "main": [], "extended": []}  # so the page takes n from diamond
