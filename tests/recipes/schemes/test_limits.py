"""What a backend cannot do is said before a run, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.models.headers import read_headers
from recipes.schemes.limits import ARCHIVED, limit_problems
from recipes.schemes.slugs import FAMILIES, by_backend, parse_scheme
from tests.recipes.checks.test_check import only
from tests.recipes.folders import write_base, write_project


@pytest.mark.parametrize(
    ("backend", "slug", "model_type", "says"),
    [
        ("auto-gptq", "gptq-w4-g32", "qwen3", "AutoGPTQ 0.7.1 (2024) does not know them"),
        ("auto-gptq", "gptq-w4-g32", "opt", "AutoGPTQ 0.7.1 (2024) was not tried with them"),
        ("autoawq", "awq-w4-g32", "gemma3_text", "AutoAWQ 0.2.9 (2025) does not know them"),
        ("autoawq", "awq-w4-g32", "qwen3", None),
        ("auto-gptq", "gptq-w4-g32", "llama", None),
    ],
)
def test_a_model_that_a_backend_does_not_quantize(
    tmp_path: Path, backend: str, slug: str, model_type: str, says: str | None
):
    headers = read_headers(write_base(tmp_path / "base", config={"model_type": model_type}))
    problems = limit_problems(by_backend(parse_scheme(slug), backend), headers)
    if says is None:
        assert not problems
    else:
        (problem,) = problems
        assert says in problem.why
        assert f"{backend} does not quantize {model_type}" in problem.what
        assert f"Leave `backend: {backend}` out" in problem.next


def test_what_llm_compressor_does_not_quantize(tmp_path: Path):
    scheme, base = parse_scheme("ct-gptq-w4-g32"), tmp_path / "base"
    assert limit_problems(scheme, read_headers(write_base(base))) == []
    (transposed,) = limit_problems(scheme, read_headers(write_base(base, config={"model_type": "gpt2"})))
    assert "Conv1D" in transposed.why


def test_check_names_the_field(tmp_path: Path):
    recipe = write_project(tmp_path)
    write_base(tmp_path / "base", config={"model_type": "qwen3"})
    problem = only(recipe, "quantize.schemes=[{scheme: gptq-w4-g32, backend: auto-gptq}]")
    assert "auto-gptq does not quantize qwen3" in problem.what and "quantize.schemes.0" in problem.where


def test_every_archived_backend_belongs_to_a_family():
    assert set(ARCHIVED) == {other for family in FAMILIES.values() for other in family.others}
