"""What quantizers hold on a GPU and beside it, by hand for an 8B; on a CPU test_preflight.py has what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.plan.memory import StepNeeds, predict
from flows.plan.quantizers import Quantizer
from recipes.models.headers import Headers, read_headers
from recipes.schema import Recipe
from recipes.schemes.slugs import parse_scheme
from tests.recipes.folders import llama_shapes, write_base, write_safetensors

GIB = 1 << 30
SHAPE = {"hidden": 4096, "intermediate": 14336, "kv": 1024, "layers": 32, "vocabulary": 128256}  # Llama 3.1 8B
TOKENS = 256 * 512
SCHEMES = ["gptq-w4-g128", "awq-w4-g128", "rtn-w4-g128", "ct-gptq-w4-g128", "ct-awq-w4-g128", "nf4"]
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # weights of a decoder layer


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    folder = write_base(tmp_path_factory.mktemp("8b"), **SHAPE)
    output = {"lm_head.weight": [SHAPE["vocabulary"], SHAPE["hidden"]]}
    write_safetensors(folder / "model.safetensors", {**llama_shapes(**SHAPE), **output})
    return read_headers(folder)


def steps(headers: Headers, device: str, **calibrate: int) -> dict[str, StepNeeds]:
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": "base"},
            "data": {"path": "rows.jsonl", "max_length": 2048},
            "calibrate": {"rows": 256, "seq_len": 512, **calibrate},
            "quantize": {"schemes": SCHEMES},
        }
    )
    return {step.key.removeprefix("quantize/"): step for step in predict(recipe, headers, device=device)}


def test_an_8b_fits_a_card_of_24_gib_and_a_usual_host(headers: Headers):
    by_slug = steps(headers, "cuda")
    for slug, most_gpu, most_host in (("gptq-w4-g128", 8, 16), ("awq-w4-g128", 8, 32), ("ct-gptq-w4-g128", 12, 48)):
        assert 1 < by_slug[slug].gpu_gib < most_gpu and by_slug[slug].needed_gib < most_host, slug
    assert by_slug["rtn-w4-g128"].gpu_gib == 0


def test_parts_on_the_gpu_and_on_the_host_by_hand(headers: Headers):
    by_slug = steps(headers, "cuda")
    gptq, awq = (
        {name: size * GIB for name, size in by_slug[f"{one}-w4-g128"].parts.items()} for one in ("gptq", "awq")
    )
    assert gptq["layer"] == awq["layer"] == pytest.approx(2 * LAYER)
    inputs = [4096] * 6 + [14336]
    assert gptq["hessians"] == pytest.approx(4 * (sum(size**2 for size in inputs) + 2 * 14336**2))
    assert gptq["activations (host)"] == pytest.approx(2 * 2 * TOKENS * 4096)  # in and out, bf16
    assert awq["inputs of a layer (host)"] == pytest.approx(
        2 * TOKENS * (3 * 4096 + 14336)
    )  # qkv, o, gate and up, down
    assert awq["tokens in work"] == pytest.approx(2 * 256 * 512 * 14336)  # clipping: outputs x tokens x inputs
    assert awq["embeddings and output layer (host)"] == pytest.approx(2 * (headers.parameters - 32 * LAYER))
    assert not any(name.startswith("weights bf16") for name in (*gptq, *awq))  # it is nowhere whole
    compressed = {name: size * GIB for name, size in by_slug["ct-gptq-w4-g128"].parts.items()}
    assert compressed["weights bf16 (host)"] == pytest.approx(2 * headers.parameters)


@pytest.mark.parametrize("slug", ["gptq-w4-g128", "awq-w4-g128", "ct-awq-w4-g128"])
def test_fewer_rows_need_less_of_the_host(headers: Headers, slug: str):
    large, small = (steps(headers, "cuda", rows=rows)[slug] for rows in (256, 128))
    assert small.needed_gib < large.needed_gib and small.gpu_gib <= large.gpu_gib


def test_the_record_is_predicted_and_refuses_nothing(headers: Headers):
    gptq = steps(headers, "cuda")["gptq-w4-g128"]
    record = gptq.parts["model of the record (host)"]
    assert record > 0 and gptq.needed_gib == pytest.approx(gptq.host_gib - record - gptq.parts["file of weights"])


def test_experts_share_what_goes_in_and_not_what_leads_out(tmp_path: Path):
    """Two layers of four experts: q, k and v; o; gate and up of all experts; each expert's down."""
    experts = {
        f"model.layers.{layer}.mlp.experts.{number}.{name}.weight": shape
        for layer in range(2)
        for number in range(4)
        for name, shape in (("gate_proj", [64, 128]), ("up_proj", [64, 128]), ("down_proj", [128, 64]))
    }
    shapes = llama_shapes(hidden=128, intermediate=256, kv=64, layers=2, vocabulary=300)
    attention = {name: shape for name, shape in shapes.items() if "mlp" not in name}
    write_safetensors(write_base(tmp_path) / "model.safetensors", {**attention, **experts})
    scheme = parse_scheme("ct-awq-w4-g32")
    quantizer = Quantizer(headers=read_headers(tmp_path), scheme=scheme, tokens=512, row_tokens=64, on_cpu=True)
    assert quantizer.distinct_inputs == 128 + 128 + 128 + 4 * 64


@pytest.mark.parametrize("tokens", [512, 131072, 131072 + 511, 12032, 300])
def test_clipping_looks_at_up_to_twice_512_tokens(headers: Headers, tokens: int):
    """GPTQModel takes every (tokens // 512)th."""
    quantizer = Quantizer(
        headers=headers, scheme=parse_scheme("awq-w4-g128"), tokens=tokens, row_tokens=512, on_cpu=False
    )
    taken = len(range(0, tokens, max(1, tokens // 512)))
    assert quantizer.clipping == 2 * 256 * taken * 14336 and taken <= 1023
