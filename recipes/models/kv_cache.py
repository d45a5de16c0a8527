"""What a model keeps of every token: keys and values by layer, from its text config.

As transformers 5.23 keeps them (cache_utils.get_layer_types_and_kwargs): layers with a window keep no more than it,
layers that share the keys and values of an earlier one keep none, layers without attention keep a state of one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from recipes.plain import is_list, is_mapping, number_of

OLD_KINDS = {"attention": "full_attention", "mamba": "linear_attention"}
WITHOUT_CACHE = ("moe", "mlp")
WINDOWS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "reference_sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
WITH_STATE = ("hybrid", "hybrid_sliding", "linear_attention", "conv")
STATE_ONLY = ("linear_attention", "conv")


class CacheLayer(NamedTuple):
    """What one layer keeps.

    Attributes:
        kind: Its type, as transformers names it.
        heads: Key-value heads.
        keys: Features of the keys per token, over all heads.
        values: Features of the values.
        window: Most tokens that it keeps; None keeps all.
        state: Numbers that it keeps however many tokens there are.
    """

    kind: str
    heads: int
    keys: int
    values: int
    window: int | None
    state: int

    def numbers(self, tokens: int) -> int:
        """Numbers for one sequence of so many tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return (self.keys + self.values) * kept + self.state


class Attention(NamedTuple):
    """The sizes that every layer has unless the config says otherwise."""

    layers: int
    hidden: int
    heads: int


def cache_layers(config: Mapping[str, Any], sizes: Attention) -> tuple[CacheLayer, ...]:
    """Every layer that keeps something, in order.

    Args:
        config: The text config, completed.
        sizes: Layers, width and attention heads.
    """
    kinds = layer_kinds(config, sizes.layers)
    shared = config.get("num_kv_shared_layers")
    own = len(kinds) - (shared if isinstance(shared, int) else 0)
    per_layer = config.get("per_layer_config")
    made: list[CacheLayer] = []
    for number, kind in enumerate(kinds[:own]):
        if kind not in WITHOUT_CACHE:
            over = per_layer.get(str(number)) if is_mapping(per_layer) else None
            made.append(_layer({**config, **(over if is_mapping(over) else {})}, kind, sizes))
    return tuple(made)


def layer_kinds(config: Mapping[str, Any], layers: int) -> list[str]:
    """The type of every layer."""
    named = config.get("layer_types") or config.get("layers_block_type")
    if is_list(named):
        return [OLD_KINDS.get(str(kind), str(kind)) for kind in named]
    if number_of(config, "sliding_window") and config.get("use_sliding_window") is not False:
        return ["sliding_attention"] * layers  # Mistral 0.1; Qwen2 switches it off
    return ["chunked_attention" if number_of(config, "attention_chunk_size") else "full_attention"] * layers


def key_value_heads(config: Mapping[str, Any], heads: int) -> int:
    """Key-value heads; as many as attention heads where nothing is said."""
    if named := number_of(config, "num_key_value_heads"):
        return named
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon, GPT-BigCode
        return 1
    return number_of(config, "num_kv_heads") or heads


def _layer(config: Mapping[str, Any], kind: str, sizes: Attention) -> CacheLayer:
    heads = key_value_heads(config, sizes.heads)
    keys, values = _features(config, heads, sizes)
    state = _state(config, sizes) if kind in WITH_STATE else 0
    if kind in STATE_ONLY and state is not None:
        return CacheLayer(kind, heads, 0, 0, None, state)
    # A state of unknown size is counted as if the layer had full attention: no less than what it takes.
    window = number_of(config, WINDOWS[kind]) if kind in WINDOWS else None
    return CacheLayer(kind, heads, keys, values, window, state or 0)


def _features(config: Mapping[str, Any], heads: int, sizes: Attention) -> tuple[int, int]:
    """Features of keys and of values, over all heads."""
    if number_of(config, "kv_lora_rank"):  # transformers keeps the keys and values that it makes of the latent
        rope, nope = number_of(config, "qk_rope_head_dim"), number_of(config, "qk_nope_head_dim")
        value = number_of(config, "v_head_dim")
        if rope and nope and value:
            return sizes.heads * (rope + nope), sizes.heads * value
    size = number_of(config, "head_dim") or sizes.hidden // sizes.heads
    return heads * size, heads * size


def _state(config: Mapping[str, Any], sizes: Attention) -> int | None:
    """Numbers of a layer's recurrent state and of its convolution; None where the config does not tell."""
    if heads := number_of(config, "linear_num_value_heads"):  # gated delta net: Qwen3-Next, Qwen3.5
        key, value = number_of(config, "linear_key_head_dim") or 0, number_of(config, "linear_value_head_dim") or 0
        wide = 2 * (number_of(config, "linear_num_key_heads") or 0) * key + heads * value
        return heads * key * value + wide * (number_of(config, "linear_conv_kernel_dim") or 4)
    if length := number_of(config, "conv_L_cache"):  # LFM2
        return sizes.hidden * length
    state = number_of(config, "mamba_d_state", "ssm_state_size", "state_size")
    heads = number_of(config, "mamba_n_heads", "mamba_num_heads", "num_heads")
    size = number_of(config, "mamba_d_head", "mamba_head_dim")
    if state and heads and size:  # Mamba 2
        return heads * size * (state + (number_of(config, "mamba_d_conv", "conv_kernel") or 4))
    if state and (expand := number_of(config, "mamba_expand", "expand")):  # Mamba 1
        return expand * sizes.hidden * (state + (number_of(config, "mamba_d_conv", "conv_kernel") or 4))
    return None
