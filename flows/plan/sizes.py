"""Sizes of a model and of the rows, from which the memory of every step is predicted; bytes, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.plan.row_sizes import RowSizes
from recipes.models.headers import Headers
from recipes.models.linear import Linear, weight_count
from recipes.schema import Recipe
from recipes.schemes.limits import size_bytes
from recipes.schemes.scheme import Scheme

GIB = 1 << 30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: code, 8-bit absmax of 64, fp32 absmax of 256 of those
# tasks/jobs/measuring/tiles.py: bf16 logits at once, whatever the vocabulary. Per logit a second copy in bf16: a soft
# cap (Gemma 2 to 4), or part of the fp32 product from which a CPU without AVX-512 rounds. Then fp64 copies of some
# tokens (teacher_forcing.py), five at a time. By arithmetic: no GPU has confirmed it.
EVAL_TILE = 128 << 20
EVAL_LOGIT_BYTES = 4
EVAL_PART = {"cpu": 8 << 20, "cuda": 64 << 20}
EVAL_COPIES = 5


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes that the formulas share."""

    recipe: Recipe
    headers: Headers
    device: str
    rows: RowSizes | None

    @property
    def data_bytes(self) -> int:
        """Of the data as JSONL."""
        return self.rows.data_bytes if self.rows else 0

    @property
    def row_count(self) -> int:
        """Rows of the data."""
        return self.rows.rows if self.rows else 0

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        limit = self.recipe.data.max_length
        return min(limit, self.rows.longest) if self.rows else limit

    @property
    def on_cpu(self) -> bool:
        """The steps work on a CPU."""
        return self.device == "cpu"

    @property
    def file(self) -> dict[str, float]:
        """The bf16 weights as they are read."""
        return {"file of weights": self.bf16} if self.on_cpu else {}

    @property
    def bf16(self) -> float:
        """The model in bf16."""
        return 2 * self.headers.loaded_parameters

    @property
    def nf4(self) -> float:
        """The model as it is trained: linear layers in NF4, the rest and experts in bf16."""
        linear = self.headers.dense_linear_parameters  # a mixture's experts stay bf16
        return NF4_BYTES * linear + 2 * (self.headers.loaded_parameters - linear)

    @property
    def gathered(self) -> float:
        """What each FSDP rank holds whole: embeddings and output layer for a step, two decoder layers for a moment."""
        layer = weight_count(self.headers.decoder_layer)
        return 2 * (self.headers.parameters - self.headers.linear_parameters) + 2 * NF4_BYTES * layer

    @property
    def lora_parameters(self) -> int:
        """Of A and B, and of DoRA's magnitudes; at the largest rank where a pattern names others."""
        train = self.recipe.train
        rank = max(train.rank, *train.rank_pattern.values(), 0)
        adapted = [layer for layer in self.headers.linears if train.adapts(layer.name)]
        magnitudes = sum(layer.out_features for layer in adapted) if train.dora else 0
        return rank * features(adapted) + magnitudes

    @property
    def saved_parameters(self) -> int:
        """Of the modules that are trained in full."""
        return saved_parameters(self.recipe, self.headers)

    @property
    def mlp(self) -> int:
        """Inputs and outputs of an FFN layer by config.json; four times as wide as the model where it says nothing."""
        width = self.headers.text_config.get("intermediate_size")
        return self.headers.hidden + (width if isinstance(width, int) else 4 * self.headers.hidden)

    def quantized(self, scheme: Scheme) -> float:
        """A quantized model: the scheme's layers, everything else in bf16."""
        return size_bytes(scheme, self.headers)

    def kv_cache(self, *, batch: int, tokens: int) -> float:
        """bf16 keys and values; layers with a window keep no more than it."""
        return 2 * self.headers.cache_numbers(tokens) * batch

    def forward(self, *, batch: int, tokens: int, last_only: bool = False) -> dict[str, float]:
        """What an evaluation forward holds beside the weights.

        Logits are those of a tile; until that was so they were those of the whole batch (3 bytes each), and with that
        the figures of docs/gpu.md were predicted (5.68 GiB) and measured (5.36) on an H200. No GPU has seen tiles yet.

        Args:
            batch: Rows.
            tokens: Of each.
            last_only: Logits of the last position alone, as decoding needs them.
        """
        headers = self.headers
        widest = max((layer.in_features + layer.out_features for layer in headers.linears), default=self.mlp)
        logits = batch * (1 if last_only else tokens) * headers.vocabulary
        copies = EVAL_COPIES * min(8 * logits, EVAL_PART[self.device])
        product = {"output layer": 4.0 * headers.vocabulary * headers.hidden} if self.on_cpu else {}  # fp32, as above
        return {
            "logits": EVAL_LOGIT_BYTES * min(logits, EVAL_TILE // 2) + copies,
            **product,
            "activations": 2 * 4 * widest * batch * tokens,
            "kv cache": self.kv_cache(batch=batch, tokens=tokens),
        }


def features(layers: Sequence[Linear]) -> int:
    """Inputs and outputs of these layers, summed."""
    return sum(layer.in_features + layer.out_features for layer in layers)


def saved_parameters(recipe: Recipe, headers: Headers) -> int:
    """Of the modules that are trained in full; a tied output layer is as large as the embeddings."""
    ends = tuple(recipe.train.modules_to_save)
    if not ends:
        return 0
    stored = sum(tensor.numel for name, tensor in headers.tensors.items() if name.rpartition(".")[0].endswith(ends))
    return stored + (headers.embedding_parameters if headers.tied and "lm_head".endswith(ends) else 0)
