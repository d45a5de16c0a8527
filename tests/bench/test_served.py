"""The page of served schemes: what counts as a difference between the table of engines and the engine."""

from __future__ import annotations

from typing import Any

from tests.bench.served import telling
from tests.bench.served_page import differs, page

CONDITIONS: dict[str, Any] = {
    **{"vllm": "0.32.0", "engine": {"torch": "2"}, "own": {"torch": "2"}, "device": "cpu", "cpu": "a CPU", "cores": 2},
    **{"memory_gib": 8, "gpus": [], "flags": ["avx2"], "model": "the quickstart's base", "lines": 600, "seed": 0},
    **{"prompt_tokens": 128, "new_tokens": 32, "repeats": 5},
}
REFUSED = {"state": "refused", "words": "ValueError: no <kernel> | none"}


def served(loss: float, served_loss: float, *, table: str | None = None) -> dict[str, Any]:
    loads = [{"requests": 8, "output_tokens_per_s": [10.0, 30.0, 20.0]}]
    figures = {"served_answers_equal": 0.5, "start_s": 3.0, "resident_gib": None, "loads": loads, "rows": 70}
    return {"state": "served", "table": table, "loss": loss, "served_loss": served_loss, "kernel": "K", **figures}


def test_what_differs():
    assert differs(served(0.05, 0.0504)) is None
    assert differs(served(0.05, 0.0506)) == "the loss differs by more than 0.0005"
    assert differs(served(4.0, 4.0004)) is None and differs(served(4.0, 3.9979)) is not None
    assert differs(served(0.05, 0.05, table="no")) == "the table says it is refused"
    assert differs({"state": "answers", "table": "no"}) == "the table says it is refused"
    assert differs({**REFUSED, "table": None}) == "the table says it is read"
    assert differs({**REFUSED, "table": "no"}) is None
    assert differs({"state": "not made", "table": None, "words": "no environment"}) is None


def test_the_page_counts_them_and_escapes_what_the_engine_says():
    text = page(CONDITIONS, {"bf16": served(0.05, 0.05), "gptq-w3": {**REFUSED, "table": "3 bits"}})
    assert "differ in none of 2 schemes" in text and "no AVX-512" in text
    assert "| bf16 | K | 0.05000 | 0.05000 | +0.00000 | 0.500 | 20 | 3 |" in text
    assert "no &lt;kernel> \\| none" in text and "Rows: 70," in text
    wrong = page(CONDITIONS, {"gptq-w3": {**REFUSED, "table": None}})
    assert "differ in 1 of 1 schemes:** gptq-w3 (the table says it is read)" in wrong
    assert "no AVX-512" not in page({**CONDITIONS, "flags": ["avx512f"]}, {})


def test_of_a_log_the_last_cause_is_kept():
    core = "(EngineCore pid=12) ERROR 11-30 04:30:00 [core.py:1] "
    said = [f"{core}ValueError: Marlin does not", f"{core}raise error"]
    assert telling([*said, "RuntimeError: Engine core initialization failed."]) == "ValueError: Marlin does not"
    assert telling(["1 validation error for VllmConfig", "  Value error, bits=2 [type=x]"]) == "Value error, bits=2"
    assert telling(["one", 'INFO: "POST /v1/completions" 500']) == 'INFO: "POST /v1/completions" 500'
    assert telling([]) == "nothing"
