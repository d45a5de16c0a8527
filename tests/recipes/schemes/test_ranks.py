"""What a card holds of a model that vLLM splits over several, by hand, and what does not come apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.models.headers import Headers, Tensor
from recipes.models.linear import Linear
from recipes.schemes.engines import padded, refusals
from recipes.schemes.rank_bytes import rank_bytes
from recipes.schemes.ranks import Part, ServedModel, parts
from recipes.schemes.slugs import parse_scheme

HEADS, FEW, SIZE, HIDDEN, INNER, VOCABULARY = 32, 4, 128, 4096, 14336, 32003
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HEADS * SIZE),
    "self_attn.k_proj": (HIDDEN, FEW * SIZE),
    "self_attn.v_proj": (HIDDEN, FEW * SIZE),
    "self_attn.o_proj": (HEADS * SIZE, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
LAYERS = tuple(Linear(f"model.layers.0.{name}", *shape) for name, shape in SHAPES.items())
CONFIG = {
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": FEW,
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
NORMS = 3 * HIDDEN


def model(layers: tuple[Linear, ...] = LAYERS) -> Headers:
    shapes = {name: (VOCABULARY, HIDDEN) for name in TABLES} | {"model.norm.weight": (NORMS,)}
    shapes |= {f"{layer.name}.weight": (layer.out_features, layer.in_features) for layer in layers}
    tensors = {name: Tensor(name, "BF16", shape, 0, Path(), 0) for name, shape in shapes.items()}
    return Headers(folder=Path(), config=CONFIG, text_config=CONFIG, tensors=tensors, linears=layers)


def by_hand(ranks: int, heads_a_rank: int) -> int:
    """Parameters of one card in bf16: attention, FFN, both tables with 32,064 entries, and the norms whole."""
    attention = HIDDEN * SIZE * (HEADS // ranks + 2 * heads_a_rank) + HEADS * SIZE // ranks * HIDDEN
    return attention + 3 * HIDDEN * INNER // ranks + 2 * 32064 // ranks * HIDDEN + NORMS


@pytest.mark.parametrize(("ranks", "heads_a_rank"), [(2, 2), (4, 1), (8, 1)])
def test_bf16_over_cards_by_hand(ranks: int, heads_a_rank: int) -> None:
    """Over 8 cards each holds one whole key-value head of the 4: they are there twice."""
    headers = model()
    stored = 2 * headers.parameters
    assert rank_bytes(stored, None, headers, ranks=ranks) == pytest.approx(2 * by_hand(ranks, heads_a_rank))
    assert rank_bytes(stored, None, headers, ranks=1) == stored


def test_a_quantized_card_by_hand() -> None:
    """4 bits, a scale of 16 bits and a zero point of 4 for 128 inputs, an int32 an input; a lone scale is whole."""
    headers, linear = model(), sum(layer.weights for layer in LAYERS)
    for slug, scale_bytes in (("gptq-w4-g128", None), ("gptq-w4", 2.5)):
        scheme = parse_scheme(slug)
        stored = scheme.predicted_bytes(LAYERS) + 2 * (headers.parameters - linear)
        held = 0.0
        for layer in LAYERS:
            down = layer.name.endswith(("o_proj", "down_proj"))
            inputs, outputs = layer.in_features // (2 if down else 1), layer.out_features // (1 if down else 2)
            groups = inputs // 128 if scale_bytes is None else 1
            held += inputs * outputs / 2 + 2.5 * groups * outputs + 4 * inputs
        rest = 2 * (32064 * HIDDEN + NORMS)
        assert rank_bytes(stored, scheme, headers, ranks=2) == pytest.approx(held + rest)


def test_marlins_padding_is_counted() -> None:
    """(n, k) of marlin_padded_nk in vLLM 0.32.0: the cheaper of 64 x 128 and 128 x 64, and inputs in whole groups."""
    for (outputs, inputs, group), expected in {
        (64, 128, 128): (64, 128),
        (128, 64, 32): (128, 64),
        (96, 160, 32): (128, 192),
        (2752, 4096, 128): (2752, 4096),
        (4096, 1376, 32): (4096, 1408),
        (100, 100, -1): (128, 128),
        (64, 96, 96): (64, 384),  # 192 inputs would do for the other tile: 128 x 192 is as much, and narrower counts
    }.items():
        found = padded(Part(Linear("0.fc1", inputs, outputs), inputs, outputs, outputs, 4, group))
        assert found == expected or (group == 96 and found == (128, 192))
    odd = (Linear("model.layers.0.mlp.down_proj", 2752, 4096),)
    headers, scheme = model(odd), parse_scheme("gptq-w4-g32")
    stored = scheme.predicted_bytes(odd) + 1e9
    plain = scheme.predicted_bytes([odd[0]._replace(in_features=1376)])
    tables = 2 * 2 * HIDDEN * (VOCABULARY - 16032)
    said = rank_bytes(stored, scheme, headers, ranks=2)
    assert said == pytest.approx(1e9 - tables + plain * 1408 / 1376)


def test_fused_query_key_value_repeats_heads_too() -> None:
    fused = Linear("model.layers.0.self_attn.qkv_proj", HIDDEN, (HEADS + 2 * FEW) * SIZE)
    served = ServedModel((fused,), HEADS, (FEW,))
    assert [served.outputs(fused, ranks) for ranks in (1, 2, 4, 8)] == [5120, 2560, 1280, (4 + 2) * SIZE]
    apart = ServedModel(LAYERS[:3], HEADS, (FEW,))
    (query, key, _) = parts(parse_scheme("gptq-w4-g128"), apart, 8)
    assert (query.outputs, query.own, key.own) == ((4 + 2) * SIZE, 4 * SIZE, SIZE)


def test_a_padded_vocabulary_that_does_not_come_apart_is_refused() -> None:
    """151,936 of Qwen are 64 x 2,374: seven cards divide its 28 heads, and not these."""
    qwen = ServedModel((), 28, (4,), 151_936)
    assert qwen.undivided(7) is not None
    (problem,) = refusals(None, ServedModel((), 28, (28,), 151_936), engine="vllm", tensor_parallel=7)
    assert "7 ranks do not divide the 151,936 entries of the padded vocabulary" in problem.what
    assert refusals(None, ServedModel((), 28, (28,), 151_936), engine="vllm", tensor_parallel=4) == []
    assert refusals(None, ServedModel((), 32, (32,), 32_003), engine="vllm", tensor_parallel=8) == []  # 32,064
