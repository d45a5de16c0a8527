"""What a backend cannot do is said before a run, with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.models.headers import Headers, read_headers
from recipes.schemes.limits import ARCHIVED, left_in_bf16, limit_problems, size_bytes, unquantized_problem
from recipes.schemes.slugs import FAMILIES, by_backend, parse_scheme
from tests.recipes.checks.test_check import only
from tests.recipes.folders import llama_shapes, write_base, write_project, write_safetensors


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


def write_mixture(folder: Path, *, stacked: bool) -> Headers:
    """Two layers of four experts, one by one as Mixtral's or as one weight each as gpt-oss'."""
    write_base(folder, config={"num_local_experts": 4})
    shapes = llama_shapes(hidden=128, intermediate=256, kv=64, layers=2, vocabulary=300)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        shapes[f"model.layers.{layer}.mlp.router.weight"] = [4, 128]
        if stacked:
            shapes |= {f"{name}.gate_up_proj": [4, 128, 512], f"{name}.down_proj": [4, 256, 128]}
        else:
            shapes |= {f"{name}.{n}.gate_up_proj.weight": [512, 128] for n in range(4)}
            shapes |= {f"{name}.{n}.down_proj.weight": [128, 256] for n in range(4)}
    write_safetensors(folder / "model.safetensors", shapes)
    return read_headers(folder)


EXPERTS = 2 * 4 * 3 * 128 * 256


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("slug", ["nf4", "int8"])
def test_bitsandbytes_leaves_experts_in_bf16_and_its_size_says_so(tmp_path: Path, slug: str, stacked: bool):
    headers, scheme = write_mixture(tmp_path, stacked=stacked), parse_scheme(slug)
    assert headers.expert_parameters == left_in_bf16(scheme, headers) == EXPERTS
    dense = headers.dense_linears
    rest = headers.parameters - headers.dense_linear_parameters
    assert size_bytes(scheme, headers) == scheme.predicted_bytes(dense) + 2 * rest > 2 * EXPERTS
    problem = unquantized_problem(scheme, headers)
    assert problem is not None and "quantize.accept_unquantized" in problem.next
    assert f"{EXPERTS / (EXPERTS + headers.dense_linear_parameters):.0%}" in problem.what


def test_stacked_experts_are_no_layers_to_round(tmp_path: Path):
    scheme = parse_scheme("rtn-w4-g32")
    assert left_in_bf16(scheme, write_mixture(tmp_path / "one", stacked=True)) == EXPERTS
    assert left_in_bf16(scheme, write_mixture(tmp_path / "many", stacked=False)) == 0  # refused for what loads of them


def test_a_dense_model_leaves_nothing(tmp_path: Path):
    headers = read_headers(write_base(tmp_path))
    for slug in ("nf4", "int8", "rtn-w4-g32", "gptq-w4-g32", "ct-awq-w4-g32"):
        assert left_in_bf16(parse_scheme(slug), headers) == 0
        assert unquantized_problem(parse_scheme(slug), headers) is None


def test_what_packs_experts_says_what_they_take(tmp_path: Path):
    (problem,) = limit_problems(parse_scheme("gptq-w4-g32"), write_mixture(tmp_path, stacked=False))
    assert f"({2 * EXPERTS / (1 << 30):.1f} GiB; quantize.accept_unquantized: true)" in problem.next


@pytest.mark.parametrize(
    ("slug", "loads"), [("ct-gptq-w4-g32", True), ("ct-awq-w4-g32", False), ("gptq-w4-g32", False)]
)
def test_single_experts_are_packed_only_where_transformers_reads_them(tmp_path: Path, slug: str, loads: bool):
    headers = write_mixture(tmp_path, stacked=False)
    known = replace(headers, text_config={**headers.text_config, "model_type": "qwen3_moe"})
    assert limit_problems(parse_scheme("ct-gptq-w4-g32"), headers)  # a type that nobody has tried
    problems = limit_problems(parse_scheme(slug), known)
    assert (problems == []) == loads
    if not loads:
        assert "ct-gptq-w4-g128" in problems[0].next


@pytest.mark.parametrize(
    ("model_type", "slug"),
    [
        ("glm4", "gptq-w4-g32"),
        ("starcoder2", "awq-w4-g32"),
        ("gpt_oss", "gptq-w4-g32"),
        ("llama4_text", "awq-w4-g32"),
        ("granitemoe", "gptq-w4-g32"),
        ("nemotron_h", "gptq-w4-g32"),
        ("gemma4_text", "ct-gptq-w4-g32"),
    ],
)
def test_what_the_matrix_of_architectures_found(tmp_path: Path, model_type: str, slug: str):
    headers = read_headers(write_base(tmp_path / "base"))
    other = replace(headers, text_config={**headers.text_config, "model_type": model_type})
    assert limit_problems(parse_scheme(slug), headers) == []
    (problem,) = limit_problems(parse_scheme(slug), other)
    assert slug in problem.what and limit_problems(parse_scheme("rtn-w4-g32"), other) == []
