"""What an adapter does to each parameter of its base: replaced, then plus scale * B @ A, then scaled by DoRA.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA divides alpha by sqrt(r) (arXiv:2312.03732). DoRA gives every output
row the trained norm m: m * V / ||V||, V = W + scale * B @ A (arXiv:2402.09353, equation 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.models import headers
from recipes.models.adapters import (
    OF_BASE,
    WEIGHTS,
    Adapter,
    lora_alpha,
    saved_part,
    split_key,
    token_indices,
    untrained,
)
from tasks.jobs.merging.skeleton import Skeleton
from tasks.jobs.merging.streams import Reader
from tasks.runtime.process.errors import StageError

PARTS = {  # tails of names -> attribute of ParameterChange
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "b",
    "lora_embedding_B": "a",
    "lora_B.bias": "shift",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}
# Settings of PEFT that make an adapter more than what stands above; PEFT itself merges them.
MORE = (
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


@dataclass(kw_only=True)
class ParameterChange:
    """What an adapter does to one parameter; its parts are still on disk.

    Attributes:
        full: Replaces the parameter (modules_to_save, bias, resized embeddings).
        a: [r, in] of a linear layer, stored so; of an embedding [dim, r].
        b: [out, r] of a linear layer; of an embedding [r, entries].
        scale: Of the sum.
        magnitude: DoRA's m [out].
        shift: Added, times scale: LoRA's bias [out].
        embedding: The parameter is an embedding.
        rows: Rows that replace some of the parameter's (trainable_token_indices) [tokens, dim].
        tokens: Which ones.
    """

    full: headers.Tensor | None = None
    a: headers.Tensor | None = None
    b: headers.Tensor | None = None
    scale: float = 1.0
    magnitude: headers.Tensor | None = None
    shift: headers.Tensor | None = None
    embedding: bool = False
    rows: headers.Tensor | None = None
    tokens: tuple[int, ...] = ()

    @property
    def whole_or_nothing(self) -> bool:
        """Nothing is computed: the parameter is the base's, or the adapter's."""
        return self.a is None and self.shift is None and self.rows is None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape that A and B make, oriented [out, in]; None without them."""
        if self.a is None or self.b is None:
            return None
        return (self.b.shape[1], self.a.shape[0]) if self.embedding else (self.b.shape[0], self.a.shape[1])

    def load(self, reader: Reader, device: str) -> Delta:
        """Read A, B and m in fp32."""

        def get(stored: headers.Tensor | None) -> Tensor | None:
            return None if stored is None else reader.whole(stored).to(device, torch.float32)

        a, b = get(self.a), get(self.b)
        if self.embedding and a is not None and b is not None:
            a, b = a.T.contiguous(), b.T.contiguous()  # as of a linear layer: rows are the entries
        magnitude, shift, rows = get(self.magnitude), get(self.shift), get(self.rows)
        return Delta(
            rows={} if rows is None else dict(zip(self.tokens, rows, strict=True)),
            a=a,
            b=None if b is None else self.scale * b,
            magnitude=None if magnitude is None else magnitude.flatten(),
            shift=None if shift is None else self.scale * shift,
        )


class Delta(NamedTuple):
    """Loaded parts of a change, fp32: A [r, in], scale * B [out, r], m [out], scale * bias [out], new rows [in]."""

    a: Tensor | None
    b: Tensor | None
    magnitude: Tensor | None
    shift: Tensor | None
    rows: Mapping[int, Tensor]

    def apply(self, rows: Tensor, first: int) -> Tensor:
        """Change rows [n, in] (or [n] of a bias) of the parameter, fp32, from row `first` on; in place."""
        last = first + rows.shape[0]
        for token, row in self.rows.items():
            if first <= token < last:
                rows[token - first] = row
        if self.shift is not None:
            rows += self.shift[first:last]
        if self.a is not None and self.b is not None:
            rows.addmm_(self.b[first:last], self.a)
        if self.magnitude is not None:
            rows *= (self.magnitude[first:last] / torch.linalg.norm(rows, dim=1)).unsqueeze(1)
        return rows


@dataclass(frozen=True, kw_only=True)
class AdapterChanges:
    """All that an adapter changes.

    Attributes:
        by_parameter: Changes by parameter of the base.
        modules: Modules that got A and B.
    """

    by_parameter: dict[str, ParameterChange] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


def beyond_stream(adapter: Adapter) -> str:
    """What in this adapter only PEFT can merge, or an empty string."""
    if adapter.config["peft_type"] != "LORA":
        return f"its kind is {adapter.config['peft_type']}"
    if adapter.initialisation == "mica":
        return "init_lora_weights: mica"
    settings = [name for name in MORE if adapter.config.get(name)]
    if adapter.config.get("use_dora") and any("lora_embedding_" in key for key in adapter.tensors):
        settings.append("DoRA of an embedding")
    modules = [split_key(key) for key in adapter.tensors]
    if {name for name, tail in modules if "lora_" in tail} & {name for name, tail in modules if "tokens" in tail}:
        settings.append("a LoRA and trained rows of one module")
    return ", ".join(settings)


def read_changes(adapter: Adapter, skeleton: Skeleton) -> AdapterChanges:
    """Sort an adapter's tensors by the parameter of the base that they change.

    Raises:
        StageError: Tensors that belong to no parameter of this base or do not fit it: all are named.
    """
    changes: dict[str, ParameterChange] = {}
    modules: dict[str, None] = {}
    for key, stored in adapter.tensors.items():
        written, tail = split_key(key)
        if any(name in key for name in OF_BASE):
            continue
        module, part = skeleton.names.here(written), PARTS.get(tail)
        if part is None:
            changes.setdefault(f"{module}.{saved_part(tail)}", ParameterChange()).full = stored
            continue
        modules[module] = None
        change = changes.setdefault(f"{module}.{'bias' if part == 'shift' else 'weight'}", ParameterChange())
        setattr(change, part, stored)
        if part == "rows":
            change.tokens = token_indices(adapter.config, written)
            continue
        change.embedding = change.embedding or tail.startswith("lora_embedding_")
        change.scale = _scale(adapter.config, written, rank=_rank(adapter, key))
    misfits = _misfits(changes, skeleton) or _lacking(adapter.config, changes, skeleton)
    if misfits:
        raise StageError.of(
            what=f"{len(misfits)} part(s) of the adapter fit nothing in this base",
            where=f"{adapter.folder / WEIGHTS}: {'; '.join(misfits)}",
            why="it was trained on another base, and a part of it would be lost without a word",
            next="merge it into the base that it was trained on",
        )
    return AdapterChanges(by_parameter=changes, modules=tuple(modules))


def _lacking(config: Mapping[str, Any], changes: Mapping[str, ParameterChange], skeleton: Skeleton) -> list[str]:
    """What the adapter's config names and its file has not."""
    adapted = {name.rpartition(".")[0] for name, change in changes.items() if change.a is not None}
    lacking = [f"{name} is a target, and not in the file" for name in untrained(config, adapted, skeleton.linears)]
    if config.get("use_dora"):
        bare = [name for name, change in changes.items() if change.a is not None and change.magnitude is None]
        lacking += [f"{name} lacks DoRA's magnitudes" for name in bare]
    return lacking


def _rank(adapter: Adapter, key: str) -> int:
    """Rank r of the module that a tensor belongs to: rows of its A."""
    stem = key[: key.index(".lora_")]
    for suffix in (".lora_A.weight", ".lora_embedding_A"):
        if (stored := adapter.tensors.get(stem + suffix)) is not None:
            return stored.shape[0]
    return int(adapter.config["r"])


def _scale(config: Mapping[str, Any], module: str, *, rank: int) -> float:
    """Alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha where a pattern names it."""
    return lora_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _misfits(changes: Mapping[str, ParameterChange], skeleton: Skeleton) -> list[str]:
    """Every part of the adapter that fits nothing in the base, with the reason."""
    misfits = []
    if not changes:
        misfits.append("it is empty")
    resizable = {f"{module}.weight" for module in skeleton.embeddings if module}
    for name, change in changes.items():
        shape = skeleton.shapes.get(name)
        if shape is None:
            misfits.append(f"{name} is not in the base")
            continue
        if change.full is not None and (why := _full_differs(change.full.shape, shape, name in resizable)):
            misfits.append(f"{name} {why}")
        rows = shape if change.full is None else change.full.shape
        oriented = tuple(reversed(rows)) if name.removesuffix(".weight") in skeleton.transposed else tuple(rows)
        if (change.a is None) != (change.b is None):
            misfits.append(f"{name} has only one of lora_A and lora_B")
        elif change.a is not None and change.b is not None and not _fits(change, oriented):
            misfits.append(f"{name} is {list(oriented)} in the base, B @ A is {list(change.shape or ())}")
        if change.magnitude is not None and math.prod(change.magnitude.shape) != oriented[0]:
            misfits.append(f"{name} has {oriented[0]} rows, DoRA's magnitudes are {list(change.magnitude.shape)}")
        if change.shift is not None and change.shift.shape != shape:
            misfits.append(f"{name} is {list(shape)} in the base, LoRA's bias is {list(change.shift.shape)}")
        if change.rows is not None and (why := _rows_differ(change, rows)):
            misfits.append(f"{name} {why}")
    return misfits


def _rows_differ(change: ParameterChange, shape: tuple[int, ...]) -> str:
    """What is wrong with trained rows of a parameter of this shape, or an empty string."""
    assert change.rows is not None
    if change.rows.shape != (len(change.tokens), *shape[1:]):
        return f"is {list(shape)} in the base, the rows of {len(change.tokens)} tokens are {list(change.rows.shape)}"
    outside = [token for token in change.tokens if token >= shape[0]]
    return f"has {shape[0]} rows; the adapter has some of tokens {outside}" if outside else ""


def _full_differs(mine: tuple[int, ...], base: tuple[int, ...], resizable: bool) -> str:
    if mine == base or (resizable and mine[1:] == base[1:]):
        return ""
    return f"is {list(base)} in the base, {list(mine)} in the adapter"


def _fits(change: ParameterChange, oriented: tuple[int, ...]) -> bool:
    assert change.a is not None and change.b is not None
    ranks = (change.a.shape[1], change.b.shape[0]) if change.embedding else (change.a.shape[0], change.b.shape[1])
    return ranks[0] == ranks[1] and change.shape == oriented
