"""Schemes: legal slugs, and what a model's shapes allow."""

import json
from dataclasses import replace

import pytest

from recipes.models.linear import Linear
from recipes.problem import RecipeError
from recipes.schemes.scheme import PER_CHANNEL, Grid, Rule, Scheme, collapsed, legal_group_sizes
from recipes.schemes.slugs import FAMILIES, by_backend, known_schemes, legal_schemes, parse_scheme

SHAPES = [
    Linear(f"model.layers.{number}.{name}", inputs, outputs)
    for number in range(3)
    for name, inputs, outputs in (("mlp.down_proj", 352, 128), ("mlp.up_proj", 128, 352), ("self_attn.k_proj", 128, 64))
]


def test_every_known_slug_parses_to_itself():
    schemes = known_schemes()
    assert len(schemes) == 3 + sum(len(family.bits) * (4 if family.per_channel else 3) for family in FAMILIES.values())
    assert all(parse_scheme(scheme.slug) == scheme for scheme in schemes)


def test_what_a_scheme_is():
    scheme = parse_scheme("awq-w4-g64")
    assert scheme.params() == {
        "method": "awq",
        "backend": "gptqmodel",
        "form": "awq",
        "bits": 4,
        "group_size": 64,
        "symmetric": False,
        "desc_act": False,
        "rules": [],
        "kv_scales": False,
    }
    assert parse_scheme("gptq-w3-g128").grid.symmetric and parse_scheme("gptq-w3-g128").needs_calibration
    assert not any(parse_scheme(slug).needs_calibration for slug in ("rtn-w2-g32", "nf4", "int8"))
    assert parse_scheme("gptq-w4").group_size == PER_CHANNEL
    options = parse_scheme("gptq-w4-g64-asym-actorder")
    assert options.desc_act and not options.grid.symmetric and options.slug == "gptq-w4-g64-asym-actorder"


@pytest.mark.parametrize("slug", ["gptq-w4", "awq-w4-g128", "nf4", "ct-gptq-w4-attn32-ffn128"])
def test_a_scheme_comes_back_from_its_params(slug: str):
    scheme = parse_scheme(slug)
    assert Scheme.of(json.loads(json.dumps(scheme.params())), slug=slug) == scheme


def test_mixed_groups_by_rules():
    scheme = parse_scheme("ct-gptq-w4-attn32-ffn128")
    grids = [scheme.grid_of(f"model.layers.3.{name}") for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert grids == [Grid(4, 32, True), Grid(4, 128, True)]
    (problem,) = scheme.check(SHAPES)  # down_proj has 352 inputs
    assert "128" in problem.what and "k_proj" not in problem.what and "group_size 32" in problem.next


def test_rules_that_split_what_servers_fuse():
    layers = [Linear(f"model.layers.0.self_attn.{part}_proj", 128, 128) for part in "qkvo"]
    plain = parse_scheme("ct-gptq-w4-g128")
    split = replace(plain, rules=(Rule("q_proj", Grid(8, 128, True)),))
    (problem,) = split.check(layers)
    assert "model.layers.*.self_attn.q_proj/k_proj/v_proj" in problem.what and not split.fits(layers)
    assert replace(plain, rules=(Rule("[qkv]_proj", None),)).check(layers) == []


def test_rules_and_fused_names_mean_the_same_layers():
    eight, plain = Grid(8, 128, True), parse_scheme("ct-gptq-w4-g128")
    parts = [Linear(f"model.layers.0.self_attn.{part}_proj", 128, 128) for part in "qkv"]
    whole = [Linear("model.layers.0.self_attn.qkv_proj", 128, 384)]  # as Phi-3 holds them
    for match in ("self_attn", r"self_attn\.qkv_proj", "[qkv]_proj"):
        ruled = replace(plain, rules=(Rule(match, eight),))
        assert {ruled.grid_of(layer.name) for layer in [*parts, *whole]} == {eight}, match
        assert ruled.check(parts) == ruled.check(whole) == []
    ruled = replace(plain, rules=(Rule("v_proj", eight),))  # also the end of qkv_proj
    assert [ruled.grid_of(layer.name) for layer in parts] == [plain.grid, plain.grid, eight]
    assert ruled.check(parts) and ruled.check(whole)


def test_another_backend():
    assert by_backend(parse_scheme("awq-w4-g128"), "autoawq").slug == "awq-w4-g128.autoawq"
    with pytest.raises(RecipeError, match="gptqmodel or auto-gptq"):
        by_backend(parse_scheme("gptq-w4-g128"), "autoawq")


@pytest.mark.parametrize(
    ("slug", "says", "near"),
    [
        ("gptq-w5-g128", "2, 3, 4 and 8 bits", "gptq-w4-g128"),
        ("awq-w3-g128", "awq can do 4 bits", "awq-w4-g128"),
        ("gptq-w4-g100", "32, 64 and 128", "gptq-w4-g128"),
        ("gtpq-w4-g128", "METHOD-wBITS-gGROUP", "gptq-w4-g128"),
        ("awq-w4", "awq has groups", "awq-w4-g128"),
        ("rtn-w4-g128-asym", "never has zero points", "rtn-w4-g128"),
        ("awq-w4-g128-asym", "always has zero points", "awq-w4-g128"),
        ("ct-gptq-w4-g128-actorder", "GPTQModel", "ct-gptq-w4-g128"),
        ("", "METHOD-wBITS-gGROUP", "rtn"),
    ],
)
def test_bits_groups_and_forms_that_cannot_be(slug: str, says: str, near: str):
    with pytest.raises(RecipeError) as caught:
        parse_scheme(slug)
    (problem,) = caught.value.problems
    assert says in problem.why and f"Write {near}" in problem.next and "awq-w4" in problem.next


def test_a_group_that_divides_no_layer_names_all_and_proposes_the_largest_legal_one():
    (problem,) = parse_scheme("gptq-w4-g128").check([*SHAPES, Linear("model.layers.0.mlp.x", 96, 64)])
    assert "model.layers.*.mlp.down_proj (in_features 352, 3 layers)" in problem.what
    assert "model.layers.*.mlp.x (in_features 96, 1 layer)" in problem.what
    assert "up_proj" not in problem.what
    assert "Write gptq-w4-g32" in problem.next


def test_no_legal_group_at_all():
    (problem,) = parse_scheme("rtn-w8-g32").check([Linear("h.0.x", 40, 64)])
    assert "write rtn-w8, one scale per output" in problem.next
    (problem,) = parse_scheme("ct-awq-w4-g32").check([Linear("h.0.x", 40, 64)])
    assert "write ct-gptq-w4-asym, one scale per output" in problem.next and parse_scheme("ct-gptq-w4-asym")
    assert legal_group_sizes([Linear("h.0.x", 40, 64)]) == ()


def test_outputs_that_cannot_be_packed():
    narrow = [Linear("h.0.k_proj", 128, 16)]
    assert parse_scheme("gptq-w4-g128").check(narrow) == []
    (problem,) = parse_scheme("gptq-w3-g128").check(narrow)
    assert "out_features 16" in problem.what and "gptq-w4-g128" in problem.next
    assert [scheme.slug for scheme in legal_schemes(narrow) if scheme.form == "awq"] == []


def test_inputs_that_fill_no_words_are_refused_per_channel():
    """Fused layers (Phi-3) may have an odd number of inputs behind an even number of outputs."""
    odd = [Linear("model.layers.0.mlp.gate_up_proj", 128, 96), Linear("model.layers.0.mlp.down_proj", 48, 128)]
    (problem,) = parse_scheme("gptq-w3").check(odd)
    assert "model.layers.*.mlp.down_proj (in_features 48" in problem.what and "gate_up" not in problem.what
    assert "32 inputs at a time" in problem.why and "Write gptq-w4:" in problem.next
    assert not parse_scheme("gptq-w3").fits(odd) and parse_scheme("ct-gptq-w3").fits(odd)
    assert parse_scheme("gptq-w4").check(odd) == parse_scheme("rtn-w2").check(odd) == []
    for slug, instead in (("rtn-w3-g32", "rtn-w4"), ("gptq-w3-g128", "gptq-w4")):  # 3 bits would be wrong, too
        (problem,) = parse_scheme(slug).check(odd)
        assert f"write {instead}, one scale per output" in problem.next
    (problem,) = parse_scheme("rtn-w4").check([Linear("h.0.x", 12, 64)])
    assert "Write rtn-w8" in problem.next
    (problem,) = parse_scheme("rtn-w8").check([Linear("h.0.x", 10, 64)])
    assert "nf4 or int8" in problem.next


def test_collapsed_keeps_sizes_apart():
    text = collapsed([Linear("a.0.x", 8, 8), Linear("a.1.x", 8, 8), Linear("a.2.x", 16, 8)])
    assert text == "a.*.x (in_features 8, 2 layers), a.*.x (in_features 16, 1 layer)"


def test_predicted_bytes_by_hand():
    layer = Linear("h.0.x", 256, 512)
    codes, groups = 256 * 512 // 2, 2 * 512
    assert parse_scheme("gptq-w4-g128").predicted_bytes([layer]) == codes + groups * 2 + groups // 2 + 4 * 256
    assert parse_scheme("awq-w4-g128").predicted_bytes([layer]) == codes + groups * 2 + groups // 2
