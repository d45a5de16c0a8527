"""The KV cache by hand, layer by layer, for models whose layers differ; and as transformers fills it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.models.headers import Headers

PLAIN = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
FIVE_TO_ONE = ["sliding_attention"] * 5 + ["full_attention"]


def numbers(tokens: int, **config: Any) -> int:
    text = {**PLAIN, **config}
    return Headers(folder=Path(), config=text, text_config=text, tensors={}, linears=()).cache_numbers(tokens)


def test_every_layer_keeps_every_token():
    assert numbers(1000) == 6 * 2 * 2 * 64 * 1000
    assert numbers(1000, head_dim=128) == 6 * 2 * 2 * 128 * 1000


def test_a_window_keeps_no_more():
    assert numbers(1000, layer_types=FIVE_TO_ONE, sliding_window=100) == 2 * 2 * 64 * (5 * 100 + 1000)
    assert numbers(50, layer_types=FIVE_TO_ONE, sliding_window=100) == 2 * 2 * 64 * 6 * 50
    chunked = ["chunked_attention"] * 5 + ["full_attention"]
    assert numbers(1000, layer_types=chunked, attention_chunk_size=100) == 2 * 2 * 64 * (5 * 100 + 1000)
    assert numbers(1000, sliding_window=100) == 6 * 2 * 2 * 64 * 100
    assert numbers(1000, sliding_window=100, use_sliding_window=False) == numbers(1000)


def test_global_layers_have_heads_of_their_own():
    """Gemma 4 as transformers 5.23 writes it."""
    gemma = {"layer_types": FIVE_TO_ONE, "sliding_window": 100, "per_layer_config": {"5": {"head_dim": 128}}}
    assert numbers(1000, **gemma) == 2 * 2 * (64 * 5 * 100 + 128 * 1000)
    gemma["per_layer_config"]["5"]["num_key_value_heads"] = 1
    assert numbers(1000, **gemma) == 2 * (2 * 64 * 5 * 100 + 128 * 1000)


def test_layers_that_share_an_earlier_cache_have_none():
    shared = {"layer_types": FIVE_TO_ONE * 2, "sliding_window": 100, "num_hidden_layers": 12}
    assert numbers(1000, **shared, num_kv_shared_layers=6) == numbers(1000, layer_types=FIVE_TO_ONE, sliding_window=100)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"multi_query": True}, 1),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 4}, 4),
        ({"num_kv_heads": 4}, 4),
        ({}, 8),
    ],
)
def test_heads_under_other_names(config: dict[str, Any], expected: int):
    assert numbers(10, num_key_value_heads=None, **config) == 6 * 2 * expected * 64 * 10


def test_latent_attention_is_kept_unfolded():
    """transformers keeps the keys and values that it makes of DeepSeek's latent: every head's."""
    latent = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24}
    assert numbers(1000, **latent) == 6 * 8 * (16 + 32 + 24) * 1000


def test_layers_without_attention_keep_a_state_of_one_size():
    kinds = ["linear_attention"] * 3 + ["full_attention", "moe", "mlp"]
    delta = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_conv_kernel_dim": 4}
    delta |= {"linear_key_head_dim": 16, "linear_value_head_dim": 32}
    state = 4 * 16 * 32 + 4 * (2 * 2 * 16 + 4 * 32)
    assert numbers(1000, layer_types=kinds, **delta) == 2 * 2 * 64 * 1000 + 3 * state
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_conv": 4}
    old = ["mamba"] * 5 + ["attention"]
    assert numbers(1000, layers_block_type=old, **mamba) == 2 * 2 * 64 * 1000 + 5 * 4 * 16 * (8 + 4)
    assert numbers(1000, layer_types=["hybrid"] * 6, **mamba) == numbers(1000) + 6 * 4 * 16 * 12
    # A state that the config does not describe counts like a full layer: never nothing.
    assert numbers(1000, layer_types=["linear_attention"] * 6) == numbers(1000)


def test_as_many_numbers_as_transformers_keeps():
    """Gemma 3 with one prompt behind its window, and Gemma 4 with global heads of another size."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Gemma4TextConfig

    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_hidden_layers": 6, "num_key_value_heads": 2, "sliding_window": 16, "pad_token_id": 0}
    gemma4 = {"global_head_dim": 32, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 4}
    for config in (Gemma3TextConfig(**sizes), Gemma4TextConfig(**sizes, **gemma4)):
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            kept = model(torch.ones(1, 40, dtype=torch.long), use_cache=True).past_key_values
        text = config.to_dict()
        text["per_layer_config"] = {str(number): one for number, one in (text.get("per_layer_config") or {}).items()}
        headers = Headers(folder=Path(), config=text, text_config=text, tensors={}, linears=())
        held = sum(layer.keys.numel() + layer.values.numel() for layer in kept.layers)
        windows = sum(layer.kind == "sliding_attention" for layer in headers.cache_layers)
        # A window of 16 holds 15 earlier tokens in transformers; the 16th is the one that is computed.
        spare = windows * sum(2 * layer.keys for layer in headers.cache_layers[:1])
        assert headers.cache_numbers(40) - spare == held
