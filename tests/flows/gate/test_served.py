"""What the engine says of the candidate: served as measured, or not promoted. Its serve step alone fails a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.gate.served import excused
from flows.report.build import evaluate
from flows.report.text import gate_sentence
from flows.results.read import read_run
from tests.flows.synthetic_run import SHAPES, Serving, SyntheticRun

FLOOR, ARM, OTHER = "merged-dequantized", "gptq-w4-g128", "gptq-w4-g32"
KEPT = ("base", "nf4-adapter", FLOOR, "merged-original", OTHER)
SHAPED = {name: SHAPES[name] for name in KEPT} | {ARM: replace(SHAPES[ARM], task=0.905, kl=5e-4, loss=7e-4)}
BROKEN = {"what": "vLLM ended while it started.", "where": "serve", "why": "ValueError: no", "next": "another arm"}


def gate(home: Path, **changes: Any) -> dict[str, Any]:
    """`gate` of a run whose candidate passes every check of its scores."""
    folder = SyntheticRun(home, shapes=SHAPED, test=1200, **changes).write()
    found = evaluate(read_run(folder, home))["gate"]
    assert found["candidate"] == ARM
    return found


def test_a_candidate_that_is_served_as_measured_passes(tmp_path: Path) -> None:
    found = gate(tmp_path, serving={FLOOR: Serving(), ARM: Serving()})
    assert (found["outcome"], found["served"]["outcome"]) == ("pass", "pass")
    assert any(line.startswith(f"In vllm 0.32.0, {ARM}: served as measured; loss ") for line in found["text"])


@pytest.mark.parametrize("fault", [Serving(bias=0.004), Serving(changed=0.3), Serving(noise=0.006)])
def test_a_candidate_that_is_served_otherwise_is_not_promoted(tmp_path: Path, fault: Serving) -> None:
    found = gate(tmp_path, serving={FLOOR: Serving(), ARM: fault})
    assert found["outcome"] == "not served as measured"
    assert all(check["outcome"] == "pass" for check in found["tests"])
    told = gate_sentence(found)
    assert told is not None
    assert told.startswith(f"{ARM} does not pass the gate: what the engine serves is not what was measured (")
    assert f"In vllm 0.32.0, {ARM}: differs by more than the floor; " in told


def test_a_candidate_that_the_engine_does_not_load_is_not_promoted(tmp_path: Path) -> None:
    serving = {FLOOR: Serving(), ARM: Serving()}
    found = gate(tmp_path, serving=serving, broken={f"serve/{ARM}": BROKEN})
    assert found["outcome"] == "not served as measured"
    why = f"{ARM} was not served: serve/{ARM}: vLLM ended while it started (ValueError: no)."
    assert found["text"][1] == why == found["served"]["text"]


def test_few_served_rows_leave_it_undecided(tmp_path: Path) -> None:
    found = gate(tmp_path, serving={FLOOR: Serving(), ARM: Serving(lost=1190)})
    assert (found["outcome"], found["served"]["outcome"]) == ("undecided", "undecided")
    assert f"In vllm 0.32.0, {ARM}: undecided; " in str(gate_sentence(found))


def test_a_candidate_that_could_not_be_tried_here_is_judged_by_its_scores(tmp_path: Path) -> None:
    """bf16 was served on this machine, four bits need what it has not got."""
    why = "4 bits need AVX-512, which this CPU has not"
    found = gate(tmp_path, serving={FLOOR: Serving()}, unserved={ARM: why})
    assert (found["outcome"], found["served"]["outcome"]) == ("pass", None)
    assert f"{ARM} was not served here: {why}." in found["text"]


def test_a_candidate_without_step_and_reason_is_not_promoted(tmp_path: Path) -> None:
    found = gate(tmp_path, serving={FLOOR: Serving()})
    assert found["outcome"] == "not served as measured"
    assert found["text"][1] == f"{ARM} was not served: the run has no step that serves it."


def test_without_the_environment_nothing_changes(tmp_path: Path) -> None:
    found = gate(tmp_path, unserved=dict.fromkeys((FLOOR, ARM), "run make env-vllm"))
    assert found["outcome"] == "pass" and "served" not in found


def test_only_the_candidates_serve_step_fails_the_run(tmp_path: Path) -> None:
    every = {slug: Serving() for slug in (FLOOR, ARM, OTHER)}
    broken = {f"serve/{slug}": BROKEN for slug in every}
    folder = SyntheticRun(tmp_path, shapes=SHAPED, test=1200, serving=every, broken=broken).write()
    assert excused(read_run(folder, tmp_path)) == {f"serve/{FLOOR}", f"serve/{OTHER}"}
    whole = SyntheticRun(tmp_path / "whole", shapes=SHAPED, test=120, serving=every).write()
    assert excused(read_run(whole, tmp_path / "whole")) == frozenset()


def test_without_a_candidate_no_serve_step_fails_the_run(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPED.items() if name not in (ARM, OTHER)}
    run = SyntheticRun(tmp_path, shapes=shapes, test=120, serving={FLOOR: Serving()})
    run.broken = {f"serve/{FLOOR}": BROKEN}
    assert excused(read_run(run.write(), tmp_path)) == {f"serve/{FLOOR}"}
