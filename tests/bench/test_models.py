"""The bench of architectures: what its page says of results, and what its forked processes leave of steps that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.models import died, first_line, forked, phase, place_of, read, write
from tests.bench.models_page import SCHEMES, cell, differs, faults, open_faults, page, refusals, table, verdict

CONDITIONS = {"seed": "0", "date": "2026-11-29", "code": "abc", "machine": "a machine", "versions": "torch 2.13.0"}
GROUPS_OF_32 = {
    "what": "The group size 32 of gptq-w4-g32 does not divide model.layers.*.mlp.down_proj (in_features 144).",
    "where": "gptq-w4-g32",
    "why": "A scale belongs to one whole group of inputs.",
    "next": "write gptq-w4.",
}


def works(**figures: Any) -> dict[str, Any]:
    return {"state": "works", **figures}


def result(said: dict[str, Any] | None = None, *, settings: tuple[str, ...] = (), **steps: Any) -> dict[str, Any]:
    """An architecture of which everything works, but for what is given."""
    check = works(said={"train": [], **{name: [] for name in SCHEMES}, **(said or {})}, settings=list(settings))
    every = {"base": works(**{"class": "TinyForCausalLM"}), "check": check, "prepare": works(), "train": works()}
    every |= {"merge": works(kl=4e-6), "baseline": works(), **{name: works(kl=1e-3) for name in SCHEMES}}
    return {"title": "Tiny", "steps": {**every, "export": works(), **steps}}


def refused(problem: dict[str, str]) -> dict[str, Any]:
    return {"state": "refused", "type": "StageError", **problem}


def failed(what: str = "no such layer", **more: Any) -> dict[str, Any]:
    return {"state": "failed", "type": "KeyError", "what": what, "where": "model.py:7 in forward", **more}


def test_what_works_has_its_figure_and_no_fault() -> None:
    whole = result(gptq=works(kl=1e-3, left_in_bf16=0.8))
    assert cell(whole, "merge").text == "works, KL 4e-06" and cell(whole, "gptq").text == "works, KL 0.001, 80% bf16"
    assert cell(whole, "evaluate").text == "works, 5 arms"
    assert open_faults(whole) == [] and verdict(whole) == "as happened"


def test_a_refusal_counts_only_where_check_says_it_too() -> None:
    both = result({"gptq": [GROUPS_OF_32]}, gptq=refused(GROUPS_OF_32))
    assert cell(both, "gptq").text == "refused" and verdict(both) == "as happened" and open_faults(both) == []
    assert refusals([both]) == "* **Tiny: GPTQ.** A scale belongs to one whole group of inputs. *Next:* write gptq-w4."

    late = result(gptq=refused(GROUPS_OF_32))
    assert cell(late, "gptq").text == "FAULT, refused late" and verdict(late) == "FAULT: GPTQ"
    assert "check passes it, the job refuses it: The group size 32" in faults([late])
    assert refusals([late]) == "None."

    wrong = result({"gptq": [GROUPS_OF_32]})
    assert cell(wrong, "gptq").text == "works, KL 0.001" and verdict(wrong) == "FAULT: GPTQ"
    assert "check refuses what works: The group size 32" in faults([wrong])


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.layers.*.mlp.down_proj",
        "model.layers.*.mlp.shared_expert_gate",
        "block_sparse_moe.router.layer",
    ],
)
def test_a_scheme_refused_for_a_tower_or_a_gate_is_a_fault(name: str) -> None:
    problem = GROUPS_OF_32 | {"what": f"The group size 32 of gptq-w4-g32 does not divide {name}."}
    towers = result({"gptq": [problem]}, gptq=refused(problem))
    assert cell(towers, "gptq").text == "FAULT, refused" and verdict(towers) == "FAULT: GPTQ"
    assert refusals([towers]) == "None."
    [fault] = open_faults(towers)
    assert fault.what.startswith("refused for what is no layer to quantize")


def test_a_merge_that_is_refused_is_a_fault_whatever_check_says() -> None:
    other = result(merge=refused(GROUPS_OF_32))
    assert cell(other, "merge").state == "FAULT"
    assert [fault.step for fault in open_faults(other)] == ["merge"]


def test_a_failure_has_a_name_and_a_place() -> None:
    broken = result(awq=failed())
    assert cell(broken, "awq").text == "FAULT, KeyError" and verdict(broken) == "as happened"
    assert faults([broken]) == "* **Tiny, AWQ**: KeyError: no such layer *At:* model.py:7 in forward"


def test_an_arm_that_was_made_and_does_not_load_is_counted_under_evaluate() -> None:
    assert cell(result(rtn=failed(phase="evaluate")), "evaluate").text == "FAULT, 1 of 5 arms"
    every: dict[str, Any] = {name: failed() for name in ("merge", *SCHEMES)}
    assert cell(result(**every), "evaluate").text == "not reached"


def test_one_fault_of_several_schemes_is_told_once() -> None:
    each: dict[str, Any] = {step: failed(f"{slug} cannot pack it") for step, slug in SCHEMES.items() if step != "ct"}
    said = "* **Tiny, GPTQ, AWQ, RTN**: KeyError: the scheme cannot pack it *At:* model.py:7 in forward"
    assert faults([result(**each)]) == said


def test_what_was_not_tried_says_so() -> None:
    assert cell(result(ct=works(not_here="not installed")), "ct").text == "not run here"
    assert cell(result(merge={"state": "not reached", "because": "no train"}), "merge").text == "not reached, no train"
    assert differs(result({"ct": [GROUPS_OF_32]}, ct=works(not_here="x")), "ct") is None


def test_the_page_counts_its_cells_and_keeps_tables_whole() -> None:
    results = [result(), result(settings=("train.accept_unquantized=true",), awq=failed("a | b <c> *d* /data/x/y.py"))]
    text = page(results, CONDITIONS)
    assert "17 works, 1 FAULT (2 x 9 cells)" in text
    assert "as happened (`train.accept_unquantized=true`)" in text
    assert r"a \| b &lt;c> \*d\* y.py" in text
    assert len({line.count("|") for line in table(results).splitlines()}) == 1


# ---- forked processes


def say() -> None:
    os.write(1, b"said\n")


def leave(code: int) -> Callable[[], None]:
    return lambda: os._exit(code)


def test_a_process_that_ends_itself_or_takes_too_long_ends_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert forked(say, log=log) is None and log.read_text() == "said\n"
    assert forked(leave(3), log=log) == "the process ended with exit code 3"
    assert forked(lambda: os.kill(os.getpid(), signal.SIGKILL), log=log) == "the process ended with SIGKILL"
    clock = time.monotonic()
    assert forked(lambda: time.sleep(60), log=log, limit_s=0.3) == "it took more than 0 s"
    assert time.monotonic() - clock < 10


def test_a_step_that_dies_behind_others_is_done_again_alone_before_it_counts(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("fine\nRuntimeError: cannot reshape\n")
    write(tmp_path, {"steps": {}, "running": {"step": "awq", "first": False}})
    died(tmp_path, "the process ended with exit code 1")
    assert read(tmp_path) == {"steps": {}, "running": None}

    write(tmp_path, {"steps": {}, "running": {"step": "awq", "first": True}})
    died(tmp_path, "the process ended with exit code 1")
    assert read(tmp_path)["steps"]["awq"] == {
        "state": "failed",
        "type": "the process ended",
        "what": "the process ended with exit code 1",
        "where": "RuntimeError: cannot reshape",
    }
    with pytest.raises(SystemExit, match="outside of any step"):
        died(tmp_path, "the process ended with exit code 1")


def test_an_exception_is_told_by_its_first_line_and_its_last_frame() -> None:
    def _evaluated() -> None:
        raise ValueError("the first\nthe second")

    with pytest.raises(ValueError, match="the first") as raised:
        _evaluated()
    assert first_line(raised.value) == "the first" and first_line(KeyError()) == "(no message)"
    assert place_of(raised.value).endswith(" in _evaluated") and place_of(raised.value).startswith("test_models.py:")
    assert phase(raised.value) == {"phase": "evaluate"}
