"""How vLLM splits a model over ranks (tensor parallelism): what a rank holds of a layer, and what cannot be split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from recipes.models.decoder import is_expert
from recipes.models.defaults import SPELLINGS
from recipes.models.headers import Headers
from recipes.models.kv_cache import STATE_ONLY
from recipes.models.linear import Linear
from recipes.plain import number_of
from recipes.schemes.scheme import FUSED, Scheme

# vLLM splits the inputs of these over its ranks, and the outputs of all others (RowParallelLinear in its models).
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2", "wo")
FUSED_QKV = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "W_pack")  # q, k and v as one weight of the checkpoint
REPEATED = ("k_proj", "v_proj")  # it repeats key-value heads where there are fewer of them than ranks
VOCABULARY = 64  # it pads the vocabulary to a multiple of this and splits that (vocab_parallel_embedding.py)
SIZES = (1, 2, 4, 8)  # ranks that a server usually has


class ServedModel(NamedTuple):
    """What a server has to split: layers and heads.

    Attributes:
        linears: The linear layers that a scheme quantizes.
        heads: Attention heads; 0 where the model has none, or nobody says how many.
        key_value_heads: Key-value heads of the layers, each number once; empty where they are not split (latent
            attention, as in DeepSeek, keeps one for all).
        vocabulary: Entries of the vocabulary; 0 where nobody says how many.
    """

    linears: tuple[Linear, ...]
    heads: int = 0
    key_value_heads: tuple[int, ...] = ()
    vocabulary: int = 0

    @classmethod
    def of(cls, headers: Headers) -> ServedModel:
        """The model that these headers describe."""
        heads = number_of(headers.text_config, "num_attention_heads", *SPELLINGS["num_attention_heads"]) or 0
        entries = number_of(headers.text_config, "vocab_size", *SPELLINGS["vocab_size"]) or 0
        if not heads or number_of(headers.text_config, "kv_lora_rank"):
            return cls(headers.linears, heads, vocabulary=entries)
        own = {layer.heads for layer in headers.cache_layers if layer.kind not in STATE_ONLY}
        return cls(headers.linears, heads, tuple(sorted(own)), entries)

    def undivided(self, ranks: int) -> str | None:
        """The heads, or the vocabulary, that do not come apart into so many ranks, in words; None where all do."""
        if self.heads % ranks:
            return f"the {self.heads} attention heads"
        for heads in self.key_value_heads:
            if max(heads, ranks) % min(heads, ranks):  # more ranks than heads: each head is on as many ranks
                return f"the {heads} key-value heads, nor do these divide them"
        if padded_vocabulary(self.vocabulary) % ranks:
            return f"the {padded_vocabulary(self.vocabulary):,} entries of the padded vocabulary"
        return None

    def inputs(self, layer: Linear, ranks: int) -> int:
        """Inputs of a layer that a rank holds."""
        return layer.in_features // (ranks if is_row_parallel(layer) else 1)

    def outputs(self, layer: Linear, ranks: int) -> int:
        """Outputs of a layer that a rank holds; of few key-value heads one.

        Where layers have different numbers of key-value heads, the smallest counts for all: no less than what it takes.
        """
        name, few = layer.name.rpartition(".")[2], min(self.key_value_heads, default=0)
        if is_row_parallel(layer):
            return layer.out_features
        if few and ranks > few and name in REPEATED:
            return layer.out_features // few
        if few and ranks > few and name in FUSED_QKV:
            return (self.heads // ranks + 2) * (layer.out_features // (self.heads + 2 * few))
        return layer.out_features // ranks

    def unsplit_layers(self, ranks: int) -> list[Linear]:
        """Layers that do not come apart into so many ranks."""
        return [
            layer
            for layer in self.linears
            if (layer.in_features if is_row_parallel(layer) else layer.out_features) % ranks
            and not layer.name.endswith(REPEATED)
        ]

    def splits(self, ranks: int) -> bool:
        """True where every rank gets the same share of every layer and of the vocabulary, in whole heads."""
        return not self.undivided(ranks) and not self.unsplit_layers(ranks)


class Part(NamedTuple):
    """A layer as one rank has it.

    Attributes:
        inputs: Of the rank.
        outputs: Of the rank, with those of the layers that are fused with it.
        own: Of them, those of this layer.
        bits: Bits per weight.
        group: Inputs that share a scale.
    """

    layer: Linear
    inputs: int
    outputs: int
    own: int
    bits: int
    group: int

    @property
    def of_experts(self) -> bool:
        """It belongs to an expert of a mixture."""
        return is_expert(self.layer.name)


def parts(scheme: Scheme, model: ServedModel, ranks: int) -> Iterator[Part]:
    """Every quantized layer with what a rank holds of it; q, k, v and gate, up count together, as they are fused."""
    fused: dict[tuple[str, tuple[str, ...]], int] = {}
    for layer in model.linears:
        fused[_fused(layer)] = fused.get(_fused(layer), 0) + model.outputs(layer, ranks)
    for layer in model.linears:
        grid = scheme.grid_of(layer.name)
        if grid is not None:
            own = model.outputs(layer, ranks)
            yield Part(layer, model.inputs(layer, ranks), fused[_fused(layer)], own, grid.bits, grid.group_size)


def padded_vocabulary(entries: int) -> int:
    """Entries of the embeddings as vLLM holds them."""
    return up_to(entries, VOCABULARY)


def up_to(number: int, step: int) -> int:
    """The smallest multiple of a step that is no less than the number."""
    return -(-number // step) * step


def is_row_parallel(layer: Linear) -> bool:
    """The inputs of this layer are split, not its outputs."""
    return layer.name.rpartition(".")[2] in ROW_PARALLEL


def _fused(layer: Linear) -> tuple[str, tuple[str, ...]]:
    stem, _, part = layer.name.rpartition(".")
    return stem, next((names for names in FUSED.values() if part in names), (part,))


def shown(some: Iterable[Part]) -> str:
    """By family: `model.layers.*.mlp.down_proj (1376 inputs, 256 outputs a rank, 32 layers)`."""
    families: dict[tuple[str, int, int], int] = {}
    for part in some:
        key = (part.layer.family, part.inputs, part.outputs)
        families[key] = families.get(key, 0) + 1
    return ", ".join(
        f"{family} ({inputs} inputs, {outputs} outputs a rank, {count} layer{'s' if count > 1 else ''})"
        for (family, inputs, outputs), count in families.items()
    )
