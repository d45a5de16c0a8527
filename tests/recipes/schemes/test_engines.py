"""Who reads what: refusals with the nearest scheme that is read, by format and by shape."""

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.checks.check import load_and_check
from recipes.checks.serving import warnings
from recipes.models.linear import Linear
from recipes.problem import RecipeError
from recipes.schemes.engines import READS, Engine, cautions, loaders, parallel_sizes, refusals
from recipes.schemes.scheme import Grid, Rule
from recipes.schemes.slugs import known_schemes, parse_scheme
from tests.recipes.folders import write_project

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart" / "recipe.yaml"
# Llama-2-7B's layers: 11,008 inputs of down_proj over 8 ranks are 1,376, which 128 does not divide and 32 does.
PARTS = (
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 4096, 4096),
    ("self_attn.v_proj", 4096, 4096),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 4096, 11008),
    ("mlp.up_proj", 4096, 11008),
    ("mlp.down_proj", 11008, 4096),
)
LLAMA = [Linear(f"model.layers.{i}.{name}", inputs, outputs) for i in range(32) for name, inputs, outputs in PARTS]


@pytest.mark.parametrize(
    ("slug", "engine", "instead"),
    [
        ("gptq-w3-g128", "vllm", "ct-gptq-w3-g128"),
        ("gptq-w2-g32", "vllm", "ct-gptq-w3-g32"),
        ("rtn-w3-g64", "vllm", "ct-gptq-w3-g64"),
        ("gptq-w4-g128-asym", "vllm", "ct-gptq-w4-g128-asym"),
        ("ct-gptq-w8-g128-asym", "vllm", "ct-gptq-w8-g128"),
        ("gptq-w8-g128", "exllamav2", "gptq-w4-g128"),
        ("ct-gptq-w4-g32", "exllamav2", "gptq-w4-g32"),
        ("nf4", "exllamav2", "gptq-w4-g64"),
        ("rtn-w3-g128", "exllamav2", "rtn-w4-g128"),
    ],
)
def test_a_refusal_names_the_nearest_scheme_that_is_read(slug: str, engine: Engine, instead: str):
    (problem,) = refusals(parse_scheme(slug), LLAMA, engine)
    assert slug in problem.what and "#" in problem.why
    assert f"Write {instead}:" in problem.next
    assert refusals(parse_scheme(instead), LLAMA, engine) == []


@pytest.mark.parametrize("slug", ["gptq-w4-g128", "gptq-w8", "awq-w4-g32", "rtn-w4-g64", "ct-gptq-w3-g128", "nf4"])
def test_what_vllm_reads(slug: str):
    assert refusals(parse_scheme(slug), LLAMA, "vllm") == []
    assert cautions(parse_scheme(slug), LLAMA, "vllm") == []


def test_every_scheme_is_read_by_transformers_and_no_form_is_without_a_source():
    assert len(known_schemes()) > 40
    assert [scheme.slug for scheme in known_schemes() if "transformers" not in loaders(scheme)] == []
    assert all(row.source and row.since for row in READS)
    assert loaders(parse_scheme("awq-w4-g128")) == ("transformers", "vllm", "autoawq")
    assert loaders(parse_scheme("gptq-w3-g128")) == ("transformers", "auto-gptq")


def test_a_group_that_ranks_cut_apart():
    (problem,) = refusals(parse_scheme("gptq-w4-g128"), LLAMA, "vllm", 8)
    assert "over 8 ranks in model.layers.*.mlp.down_proj (1376 inputs, 4096 outputs a rank, 32 layers)" in problem.what
    assert "gptq-w4-g32" in problem.next and "o_proj" not in problem.what
    assert parallel_sizes(parse_scheme("gptq-w4-g128"), LLAMA, "vllm") == (1, 2)  # 11,008 / 4 = 21.5 x 128
    assert parallel_sizes(parse_scheme("gptq-w4-g32"), LLAMA, "vllm") == (1, 2, 4, 8)
    assert parallel_sizes(parse_scheme("int8"), LLAMA, "vllm") == (1,)


def test_ranks_that_divide_no_layer():
    problem = refusals(parse_scheme("gptq-w4"), LLAMA, "vllm", 3)[0]
    assert "3 ranks do not divide" in problem.what and "serve.tensor_parallel to 2" in problem.next


def test_few_key_value_heads_are_repeated_not_split():
    layers = [Linear("model.layers.0.self_attn.q_proj", 512, 512), Linear("model.layers.0.self_attn.k_proj", 512, 20)]
    assert refusals(parse_scheme("ct-gptq-w4-g128"), layers, "vllm", 8) == []


def test_tiles_are_padded_but_not_in_activation_order():
    odd = [Linear("model.layers.0.mlp.fc1", 160, 96), Linear("model.layers.1.mlp.fc1", 160, 96)]
    (caution,) = cautions(parse_scheme("gptq-w4-g32"), odd, "vllm")
    assert "model.layers.*.mlp.fc1 (160 inputs, 96 outputs a rank, 2 layers)" in caution.what
    assert "vllm#45295" in caution.why and refusals(parse_scheme("gptq-w4-g32"), odd, "vllm") == []
    (problem,) = refusals(parse_scheme("gptq-w4-g32-actorder"), odd, "vllm")
    assert "activation order" in problem.what and "Write gptq-w4-g32:" in problem.next
    assert cautions(parse_scheme("gptq-w4-g32-actorder"), odd, "vllm") == []


def test_fused_layers_share_a_tile():
    """q, k and v of 32 + 16 + 16 outputs are one weight of 64."""
    fused = [
        Linear(f"model.layers.0.self_attn.{part}_proj", 128, size)
        for part, size in zip("qkv", (32, 16, 16), strict=True)
    ]
    assert cautions(parse_scheme("gptq-w4-g128"), fused, "vllm") == []
    assert len(cautions(parse_scheme("gptq-w4-g128"), fused[:1], "vllm")) == 1


def test_rules_count_with_all_their_grids():
    mixed = replace(parse_scheme("ct-gptq-w4-g128"), rules=(Rule("mlp", Grid(8, 128, False)),), slug="mixed")
    assert "8-bit weights with zero points" in refusals(mixed, LLAMA, "vllm")[0].what


def test_zero_points_of_experts():
    experts = [Linear(f"model.layers.0.mlp.experts.{i}.down_proj", 256, 128) for i in range(4)]
    (problem,) = refusals(parse_scheme("ct-gptq-w4-g128-asym"), experts, "vllm")
    assert "experts" in problem.what and "vllm#39980" in problem.why
    assert refusals(parse_scheme("ct-gptq-w4-g128"), experts, "vllm") == []


SCHEMES = "quantize: {schemes: [gptq-w3-g128, awq-w4-g128]}\nevaluate: {on_base: [gptq-w4-g128-asym]}\n"


def test_check_warns_by_field_and_passes(tmp_path: Path):
    recipe = write_project(tmp_path, extra=f"{SCHEMES}serve: {{engine: vllm}}\n")
    of_engine = warnings(load_and_check(recipe))
    assert [problem.where.split()[-1] for problem in of_engine] == ["quantize.schemes.0", "evaluate.on_base.0"]
    assert "recipe.yaml:9" in of_engine[0].where and "ct-gptq-w3-g128" in of_engine[0].next
    assert warnings(load_and_check(recipe, sets=["serve.engine=none"])) == []
    on_four = warnings(load_and_check(recipe, sets=["serve.tensor_parallel=4"]))
    # 128 / 4 and 256 / 4 inputs, groups of 128
    assert any("cut apart over 4 ranks" in problem.what for problem in on_four)


def test_the_quickstart_names_no_engine():
    assert warnings(load_and_check(QUICKSTART)) == []


def test_a_context_longer_than_the_base(tmp_path: Path):
    recipe = write_project(tmp_path, extra="serve: {max_model_len: 513}\n")
    with pytest.raises(RecipeError, match="512 or less"):
        load_and_check(recipe)
    load_and_check(recipe, sets=["serve.max_model_len=512"])
