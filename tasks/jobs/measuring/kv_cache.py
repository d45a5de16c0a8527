"""A KV cache as a server would store it, simulated: what storage gives back is what attention reads. Storage only.

The seam is transformers' own: every attention layer hands its new keys (after rotary embedding) and values (as
projected) to the cache's `update` and attends to what that returns. A quantized entry depends on nothing but itself, so
entering it once is storing it: prefill, decode and teacher forcing read the same numbers at every position, the newest
included. Queries, products and sums stay in the model's type: no kernel that computes in 8 bits is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from recipes.arms import KV
from tasks.jobs.measuring.tiles import Model, last_only
from tasks.runtime.process.errors import StageError

LABEL = "storage only"
E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
INT8_MAX = 127


class Entries(NamedTuple):
    """Keys and values of some tokens in one layer, both [batch, heads, tokens, head size]."""

    keys: Tensor
    values: Tensor


Storage = Callable[[Entries, int], Entries]
"""(new entries, layer) -> what storage gives back for them."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scales of a layer's keys and values in e4m3; 1.0 stores them as they are."""

    keys: float = 1.0
    values: float = 1.0


class StoredCache(DynamicCache):
    """transformers' growing cache, sliding windows included, with a storage in front of it."""

    def __init__(self, config: PreTrainedConfig, storage: Storage) -> None:
        super().__init__(config=config)
        self._storage = storage

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new entries; returns all that its attention reads, as storage gives them back."""
        stored = self._storage(Entries(key_states, value_states), layer_idx)
        return super().update(stored.keys, stored.values, layer_idx, *args, **kwargs)


def e4m3(numbers: Tensor, scale: float) -> Tensor:
    """To e4m3 (4 exponent bits, 3 of fraction) and back: round(x / scale) * scale, saturated at 448 * scale.

    torch turns what is out of range into NaN; servers saturate (CUDA's __NV_SATFINITE), so this does. NaN stays NaN.
    """
    scaled = (numbers.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return (scaled.to(E4M3).float() * scale).to(numbers.dtype)


def int8(numbers: Tensor) -> Tensor:
    """To int8 and back with a symmetric fp32 scale per token and head: the largest of a head's numbers / 127.

    numbers [..., head size]. Off by at most half a scale, and by the rounding to their type.
    """
    largest = numbers.float().abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / INT8_MAX)
    return ((numbers.float() / scale).round() * scale).to(numbers.dtype)


@dataclass
class Maxima:
    """A storage that changes nothing and keeps the largest absolute key and value of every layer."""

    maxima: dict[int, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, new: Entries, layer: int) -> Entries:
        """Look at some entries."""
        keys, values = self.maxima.get(layer, (0.0, 0.0))
        self.maxima[layer] = (max(keys, _largest(new.keys)), max(values, _largest(new.values)))
        return new

    @property
    def scales(self) -> dict[int, Scales]:
        """Scales that put each layer's largest number on e4m3's largest."""
        return {
            layer: Scales(keys=_scale(keys), values=_scale(values)) for layer, (keys, values) in self.maxima.items()
        }


def _largest(numbers: Tensor) -> float:
    return numbers.abs().max().item()


def _scale(largest: float) -> float:
    return largest / E4M3_MAX if largest else 1.0


@torch.inference_mode()
def calibrated(model: Model, calibset: Path) -> dict[int, Scales]:
    """Scales by layer from the largest absolute keys and values over calibset.parquet, unquantized."""
    maxima = Maxima()
    for ids in pq.read_table(calibset / "calibset.parquet", columns=["input_ids"])["input_ids"].to_pylist():
        cache = StoredCache(model.config, maxima)
        line = torch.tensor([ids], device=model.device)
        model(input_ids=line, past_key_values=cache, use_cache=True, **last_only(model))
    return maxima.scales


@dataclass
class KVCache:
    """Makes a fresh cache for every batch; remembers which layers used it.

    Attributes:
        config: The model's.
        kind: How entries are stored.
        scales: By layer; used by `fp8-calibrated` alone.
    """

    config: PreTrainedConfig
    kind: KV
    scales: dict[int, Scales] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if getattr(self.config.get_text_config(decoder=True), "kv_lora_rank", None):
            raise _cannot_simulate(
                "the model caches a latent vector a token, not keys and values (kv_lora_rank in config.json)",
                "transformers caches what is projected from it, so what a server would store cannot be simulated here",
            )

    def __call__(self) -> StoredCache:
        """An empty cache."""
        return StoredCache(self.config, self._stored)

    def _stored(self, new: Entries, layer: int) -> Entries:
        self.layers.add(layer)
        if self.kind == "int8":
            return Entries(int8(new.keys), int8(new.values))
        scale = self.scales[layer] if self.kind == "fp8-calibrated" else Scales()
        return Entries(e4m3(new.keys, scale.keys), e4m3(new.values, scale.values))

    def record(self) -> dict[str, Any]:
        """What was done, for kv_cache.json.

        Raises:
            StageError: No layer has used the cache, so that nothing was quantized.
        """
        if not self.layers:
            raise _cannot_simulate("no layer of the model stores keys and values in a cache", "nothing was quantized")
        return {
            "kind": self.kind,
            "label": LABEL,
            "layers": sorted(self.layers),
            "scales": {str(layer): asdict(scale) for layer, scale in sorted(self.scales.items())},
        }

    @property
    def note(self) -> str:
        """How entries are stored, in words."""
        how = {
            "fp8": "e4m3 with scale 1",
            "fp8-calibrated": "e4m3 with a scale each for keys and values of a layer, their largest absolute number "
            f"over the calibration set / {E4M3_MAX:g}",
            "int8": "int8 with a scale a token and head",
        }[self.kind]
        return (
            f"simulated, {LABEL}: keys after rotary embedding and values as projected go to {how} and back before "
            f"attention reads them, in prefill and decode alike; {len(self.layers)} layers"
        )


def _cannot_simulate(what: str, why: str) -> StageError:
    return StageError.of(
        what=what, where="evaluate.kv_cache", why=why, next="leave evaluate.kv_cache out for this model"
    )
