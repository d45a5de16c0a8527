"""Who reads what: refusals with the nearest scheme that is read, by format and by shape."""

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.checks.check import load_and_check
from recipes.checks.serving import warnings
from recipes.models.headers import Headers
from recipes.models.linear import Linear
from recipes.problem import RecipeError
from recipes.schemes.engines import cautions, cpu_refusals, loaders, parallel_sizes, refusals
from recipes.schemes.ranks import ServedModel
from recipes.schemes.reads import READS, Engine
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
LAYERS = [Linear(f"model.layers.{i}.{name}", inputs, outputs) for i in range(32) for name, inputs, outputs in PARTS]
LLAMA = ServedModel(tuple(LAYERS), 32, (32,))


def of(*layers: Linear) -> ServedModel:
    return ServedModel(layers)


@pytest.mark.parametrize(
    ("slug", "engine", "instead"),
    [
        ("gptq-w3-g128", "vllm", "ct-gptq-w3-g128"),
        ("gptq-w2-g32", "vllm", "ct-gptq-w3-g32"),
        ("rtn-w3-g64", "vllm", "ct-gptq-w3-g64"),
        ("gptq-w4-g128-asym", "vllm", "ct-gptq-w4-g128-asym"),
        ("gptq-w8-g128-asym", "vllm", "ct-gptq-w8-g128-asym"),
        ("gptq-w8-g128", "exllamav2", "gptq-w4-g128"),
        ("ct-gptq-w4-g32", "exllamav2", "gptq-w4-g32"),
        ("nf4", "exllamav2", "gptq-w4-g64"),
        ("rtn-w3-g128", "exllamav2", "rtn-w4-g128"),
    ],
)
def test_a_refusal_names_the_nearest_scheme_that_is_read(slug: str, engine: Engine, instead: str):
    (problem,) = refusals(parse_scheme(slug), LLAMA, engine=engine)
    assert slug in problem.what and "#" in problem.why
    assert f"Write {instead}:" in problem.next
    assert refusals(parse_scheme(instead), LLAMA, engine=engine) == []


@pytest.mark.parametrize("slug", ["gptq-w4-g128", "gptq-w8", "awq-w4-g32", "rtn-w4-g64", "ct-gptq-w3-g128", "nf4"])
def test_what_vllm_reads(slug: str):
    assert refusals(parse_scheme(slug), LLAMA, engine="vllm") == []
    assert cautions(parse_scheme(slug), LLAMA, engine="vllm") == []


def test_every_scheme_is_read_by_transformers_and_no_form_is_without_a_source():
    assert len(known_schemes()) > 40
    assert [scheme.slug for scheme in known_schemes() if "transformers" not in loaders(scheme)] == []
    assert all(row.source and row.version for row in READS)
    assert loaders(parse_scheme("awq-w4-g128")) == ("transformers", "vllm", "autoawq", "onnxruntime-genai")
    assert loaders(parse_scheme("gptq-w3-g128")) == ("transformers", "auto-gptq")


def test_a_group_that_ranks_cut_apart():
    (problem,) = refusals(parse_scheme("gptq-w4-g128"), LLAMA, engine="vllm", tensor_parallel=8)
    assert "over 8 ranks in model.layers.*.mlp.down_proj (1376 inputs, 4096 outputs a rank, 32 layers)" in problem.what
    assert "gptq-w4-g32" in problem.next and "o_proj" not in problem.what
    assert parallel_sizes(parse_scheme("gptq-w4-g128"), LLAMA, engine="vllm") == (1, 2)  # 11,008 / 4 = 21.5 x 128
    assert parallel_sizes(parse_scheme("gptq-w4-g32"), LLAMA, engine="vllm") == (1, 2, 4, 8)
    assert parallel_sizes(parse_scheme("int8"), LLAMA, engine="vllm") == (1,)


def test_ranks_that_divide_no_layer():
    problem = refusals(parse_scheme("gptq-w4"), LLAMA, engine="vllm", tensor_parallel=3)[0]
    assert "3 ranks do not divide" in problem.what and "serve.tensor_parallel to 1 or 2" in problem.next


def test_few_key_value_heads_are_repeated_not_split():
    layers = of(Linear("model.layers.0.self_attn.q_proj", 512, 512), Linear("model.layers.0.self_attn.k_proj", 512, 20))
    assert refusals(parse_scheme("ct-gptq-w4-g128"), layers, engine="vllm", tensor_parallel=8) == []


def test_tiles_are_padded():
    odd = of(Linear("model.layers.0.mlp.fc1", 160, 96), Linear("model.layers.1.mlp.fc1", 160, 96))
    (caution,) = cautions(parse_scheme("gptq-w4-g32"), odd, engine="vllm")
    assert "model.layers.*.mlp.fc1 (160 inputs, 96 outputs a rank, 2 layers)" in caution.what
    assert "vllm#45295" in caution.why and refusals(parse_scheme("gptq-w4-g32"), odd, engine="vllm") == []
    for inputs, outputs in ((128, 64), (64, 128)):  # either tile does
        assert cautions(parse_scheme("gptq-w4-g32"), of(Linear("0.fc1", inputs, outputs)), engine="vllm") == []


def test_activation_order_is_refused_with_groups_and_changes_nothing_per_channel():
    (problem,) = refusals(parse_scheme("gptq-w4-g128-actorder"), LLAMA, engine="vllm")
    assert "activation order" in problem.what and "Write gptq-w4-g128:" in problem.next
    assert "0.32.0" in problem.why and "gptq_utils.py" in problem.why
    readers = ("transformers", "exllamav2", "auto-gptq", "onnxruntime-genai")
    assert loaders(parse_scheme("gptq-w4-g128-actorder")) == readers
    assert refusals(parse_scheme("gptq-w4-actorder"), LLAMA, engine="vllm") == []


def test_fused_layers_share_a_tile():
    """q, k and v of 32 + 16 + 16 outputs are one weight of 64."""
    fused = [
        Linear(f"model.layers.0.self_attn.{part}_proj", 128, size)
        for part, size in zip("qkv", (32, 16, 16), strict=True)
    ]
    assert cautions(parse_scheme("gptq-w4-g128"), of(*fused), engine="vllm") == []
    assert len(cautions(parse_scheme("gptq-w4-g128"), of(fused[0]), engine="vllm")) == 1


def test_rules_count_with_all_their_grids():
    mixed = replace(parse_scheme("gptq-w4-g128"), rules=(Rule("mlp", Grid(8, 128, False)),), slug="mixed")
    assert "8-bit weights with zero points" in refusals(mixed, LLAMA, engine="vllm")[0].what


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_of_two_to_eight_bits(bits: int, symmetric: bool):
    scheme = replace(parse_scheme("ct-gptq-w4-g128"), grid=Grid(bits, 128, symmetric))
    assert refusals(scheme, LLAMA, engine="vllm") == []


def experts_of(width: int, inner: int) -> ServedModel:
    return of(
        *(Linear(f"model.layers.0.mlp.experts.{i}.gate_proj", width, inner) for i in range(4)),
        *(Linear(f"model.layers.0.mlp.experts.{i}.down_proj", inner, width) for i in range(4)),
    )


def test_experts():
    experts = experts_of(256, 128)
    for slug in ("ct-gptq-w4-g128-asym", "ct-gptq-w4", "gptq-w8-g128", "awq-w4-g64", "ct-gptq-w3-g128", "nf4"):
        assert refusals(parse_scheme(slug), experts, engine="vllm") == []
    (problem,) = refusals(parse_scheme("ct-gptq-w3"), experts, engine="vllm")  # Humming's experts have groups
    assert "ct-gptq-w3 in experts" in problem.what and "groups" in problem.why and "-g" in problem.next
    (problem,) = refusals(parse_scheme("ct-gptq-w8-g128-asym"), experts, engine="vllm")
    assert "experts" in problem.what and "Write ct-gptq-w8-g128:" in problem.next
    (problem,) = refusals(parse_scheme("int8"), experts, engine="vllm")
    assert "int8 in experts" in problem.what and "vllm-bnb-plugin" in problem.why
    assert refusals(parse_scheme("ct-gptq-w3"), LLAMA, engine="vllm") == []


def test_experts_whose_model_has_no_tile():
    narrow = experts_of(192, 128)
    assert "no kernel" in refusals(parse_scheme("ct-gptq-w4"), narrow, engine="vllm")[0].what
    assert refusals(parse_scheme("ct-gptq-w4-g64"), narrow, engine="vllm") == []
    assert len(cautions(parse_scheme("ct-gptq-w4-g64"), narrow, engine="vllm")) == 1


# Qwen2.5-7B: 28 heads of 128 and 4 key-value heads; 3,584 and 18,944 are multiples of 8, its heads are not.
QWEN = ServedModel(
    tuple(
        Linear(f"model.layers.0.{name}", inputs, outputs)
        for name, inputs, outputs in (
            ("self_attn.q_proj", 3584, 3584),
            ("self_attn.k_proj", 3584, 512),
            ("self_attn.v_proj", 3584, 512),
            ("self_attn.o_proj", 3584, 3584),
            ("mlp.gate_proj", 3584, 18944),
            ("mlp.up_proj", 3584, 18944),
            ("mlp.down_proj", 18944, 3584),
        )
    ),
    28,
    (4,),
)


def test_a_rank_holds_whole_heads():
    assert parallel_sizes(None, QWEN, engine="vllm") == (1, 2, 4)
    assert parallel_sizes(parse_scheme("gptq-w4-g32"), QWEN, engine="vllm") == (1, 2, 4)
    for scheme in (None, parse_scheme("gptq-w4-g128")):
        (problem,) = refusals(scheme, QWEN, engine="vllm", tensor_parallel=8)
        assert "8 ranks do not divide the 28 attention heads" in problem.what
        assert "serve.tensor_parallel to 1, 2 or 4" in problem.next
        assert refusals(scheme, QWEN, engine="transformers", tensor_parallel=8) == []


@pytest.mark.parametrize(
    ("key_value", "sizes"), [(1, (1, 2, 4, 8)), (2, (1, 2, 4, 8)), (6, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4))]
)
def test_key_value_heads_divide_the_ranks_or_the_reverse(key_value: int, sizes: tuple[int, ...]):
    assert parallel_sizes(None, ServedModel(LLAMA.linears, 48, (key_value,)), engine="vllm") == sizes


def test_heads_come_from_the_headers(tmp_path: Path):
    text = {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 2, "hidden_size": 3584}

    def described(**more: object) -> ServedModel:
        config = text | more
        return ServedModel.of(Headers(folder=tmp_path, config=config, text_config=config, tensors={}, linears=()))

    assert described() == ServedModel((), 28, (4,))
    assert described(vocab_size=151_936).vocabulary == 151_936
    assert described(kv_lora_rank=512) == ServedModel((), 28, ())  # latent attention keeps one head for all
    assert described(layer_types=["linear_attention", "full_attention"], conv_L_cache=3) == ServedModel((), 28, (4,))
    mamba = {"hidden_size": 64, "num_hidden_layers": 2}
    assert ServedModel.of(
        Headers(folder=tmp_path, config={}, text_config=mamba, tensors={}, linears=())
    ) == ServedModel(())


@pytest.mark.parametrize(
    ("slug", "said"),
    [
        ("gptq-w4-g128", None),
        ("rtn-w4", None),
        ("awq-w4-g32", None),
        ("ct-gptq-w4-g128-asym", None),
        ("gptq-w8-g128", "4-bit weights alone"),
        ("ct-gptq-w3-g128", "4-bit weights alone"),
        ("nf4", "4-bit weights alone"),
    ],
)
def test_what_vllm_serves_on_a_cpu(slug: str, said: str | None):
    problems = cpu_refusals(parse_scheme(slug), LLAMA, avx512=True)
    assert [said in problem.why for problem in problems if said] == ([True] if said else [])
    assert (problems == []) == (said is None)


def test_a_cpu_without_avx512_serves_bf16_alone():
    assert cpu_refusals(None, LLAMA, avx512=False) == []
    (problem,) = cpu_refusals(parse_scheme("awq-w4-g128"), LLAMA, avx512=False)
    assert "avx512f" in problem.next and "first request" in problem.why and problem.where == "awq-w4-g128"


def test_shapes_and_experts_on_a_cpu():
    (problem,) = cpu_refusals(parse_scheme("gptq-w4"), of(Linear("0.fc1", 48, 64)), avx512=True)
    assert "(48 inputs, 64 outputs" in problem.what
    model = ServedModel((Linear("0.o_proj", 64, 64),))
    assert cpu_refusals(parse_scheme("gptq-w4"), model, avx512=True, tensor_parallel=2) == []
    assert len(cpu_refusals(parse_scheme("gptq-w4"), model, avx512=True, tensor_parallel=4)) == 1  # 16 inputs a rank
    experts = experts_of(256, 128)
    (problem,) = cpu_refusals(parse_scheme("gptq-w4-g32"), experts, avx512=True)
    assert "AMX" in problem.why
    assert cpu_refusals(parse_scheme("gptq-w4-g32"), experts, avx512=True, amx=True) == []
    assert len(cpu_refusals(parse_scheme("ct-gptq-w4-g32"), experts, avx512=True, amx=True)) == 1


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
    on_three = warnings(load_and_check(recipe, sets=["serve.tensor_parallel=3"]))
    assert [problem.where.split()[-1] for problem in on_three] == [
        "serve.tensor_parallel",  # once: no scheme mends it
        "quantize.schemes.0",
        "evaluate.on_base.0",
    ]


def test_the_quickstart_names_no_engine():
    assert warnings(load_and_check(QUICKSTART)) == []


def test_a_context_longer_than_the_base(tmp_path: Path):
    recipe = write_project(tmp_path, extra="serve: {max_model_len: 513}\n")
    with pytest.raises(RecipeError, match="512 or less"):
        load_and_check(recipe)
    load_and_check(recipe, sets=["serve.max_model_len=512"])


def test_onnxruntime_wants_groups_that_are_powers_of_two():
    assert refusals(parse_scheme("gptq-w4-g128"), LLAMA, engine="onnxruntime-genai") == []
    (problem,) = refusals(parse_scheme("gptq-w4"), LLAMA, engine="onnxruntime-genai")
    assert "11008 inputs" in problem.what and "matmul_nbits.cc" in problem.why and "Write gptq-w4-g" in problem.next
    assert "o_proj" not in problem.what  # 4,096 inputs are a power of two
    cut = of(Linear("model.layers.0.mlp.down_proj", 160, 96))
    assert refusals(parse_scheme("gptq-w4-g64"), cut, engine="onnxruntime-genai")
    assert refusals(parse_scheme("gptq-w4-g32"), cut, engine="onnxruntime-genai") == []
    (problem,) = refusals(parse_scheme("gptq-w4-g128"), LLAMA, engine="onnxruntime-genai", tensor_parallel=2)
    assert "2 ranks" in problem.what
    assert refusals(parse_scheme("ct-gptq-w4-g128"), LLAMA, engine="onnxruntime-genai")
    assert refusals(parse_scheme("gptq-w3-g128"), LLAMA, engine="onnxruntime-genai")
