"""What an adapter does to each parameter of its base: replaced, then plus scale * B @ A, then scaled by DoRA.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA divides alpha by sqrt(r) (arXiv:2312.03732). DoRA gives every output
row the trained norm m: m * V / ||V||, V = W + scale * B @ A (arXiv:2402.09353, equation 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from recipes.models import headers
from recipes.models.adapters import WEIGHTS, Adapter
from tasks.jobs.merging.skeleton import Skeleton
from tasks.jobs.merging.streams import Reader
from tasks.runtime.process.errors import StageError

PREFIX = "base_model.model."  # PEFT's, before the base's own module names
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)\.")
PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)$"
)
# Settings of PEFT that make an adapter more than what stands above; PEFT itself merges them.
MORE = (
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
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
    """

    full: headers.Tensor | None = None
    a: headers.Tensor | None = None
    b: headers.Tensor | None = None
    scale: float = 1.0
    magnitude: headers.Tensor | None = None
    shift: headers.Tensor | None = None
    embedding: bool = False

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
        magnitude, shift = get(self.magnitude), get(self.shift)
        return Delta(
            a=a,
            b=None if b is None else self.scale * b,
            magnitude=None if magnitude is None else magnitude.flatten(),
            shift=None if shift is None else self.scale * shift,
        )


class Delta(NamedTuple):
    """Loaded parts of a change, fp32: A [r, in], scale * B [out, r], m [out], scale * bias [out]."""

    a: Tensor | None
    b: Tensor | None
    magnitude: Tensor | None
    shift: Tensor | None

    def apply(self, rows: Tensor, first: int) -> Tensor:
        """Change rows [n, in] (or [n] of a bias) of the parameter, fp32, from row `first` on; in place."""
        last = first + rows.shape[0]
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
    return ", ".join(settings)


def read_changes(adapter: Adapter, skeleton: Skeleton) -> AdapterChanges:
    """Sort an adapter's tensors by the parameter of the base that they change.

    Raises:
        StageError: Tensors that belong to no parameter of this base or do not fit it: all are named.
    """
    changes: dict[str, ParameterChange] = {}
    modules: dict[str, None] = {}
    for key, stored in adapter.tensors.items():
        name = WRAPPERS.sub(".", key.removeprefix(PREFIX))
        if ".original_module." in name:  # the base's own weights, which PEFT saves beside a resized embedding
            continue
        match = PART.match(name)
        if match is None:
            parent, _, leaf = name.rpartition(".")
            changes.setdefault(f"{skeleton.module(parent)}.{leaf}", ParameterChange()).full = stored
            continue
        module, part = skeleton.module(match["module"]), match["part"]
        modules[module] = None
        leaf = "bias" if part == "lora_B.bias" else "weight"
        change = changes.setdefault(f"{module}.{leaf}", ParameterChange())
        _place(change, part, stored)
        change.scale = _scale(adapter.config, match["module"], rank=_rank(adapter, key))
    misfits = _misfits(changes, skeleton)
    if adapter.config.get("use_dora"):
        bare = [name for name, change in changes.items() if change.a is not None and change.magnitude is None]
        misfits += [f"{name} lacks DoRA's magnitudes" for name in bare]
    if misfits:
        raise StageError.of(
            what=f"{len(misfits)} part(s) of the adapter fit nothing in this base",
            where=f"{adapter.folder / WEIGHTS}: {'; '.join(misfits)}",
            why="it was trained on another base, and a part of it would be lost without a word",
            next="merge it into the base that it was trained on",
        )
    return AdapterChanges(by_parameter=changes, modules=tuple(modules))


def _place(change: ParameterChange, part: str, stored: headers.Tensor) -> None:
    match part:
        case "lora_A.weight":
            change.a = stored
        case "lora_B.weight":
            change.b = stored
        case "lora_embedding_A":
            change.b, change.embedding = stored, True
        case "lora_embedding_B":
            change.a, change.embedding = stored, True
        case "lora_B.bias":
            change.shift = stored
        case _:
            change.magnitude = stored


def _rank(adapter: Adapter, key: str) -> int:
    """Rank r of the module that a tensor belongs to: rows of its A."""
    stem = key[: key.index(".lora_")]
    for suffix in (".lora_A.weight", ".lora_embedding_A"):
        if (stored := adapter.tensors.get(stem + suffix)) is not None:
            return stored.shape[0]
    return int(adapter.config["r"])


def _scale(config: Mapping[str, Any], module: str, *, rank: int) -> float:
    """Alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha where a pattern names it."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


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
    return misfits


def _full_differs(mine: tuple[int, ...], base: tuple[int, ...], resizable: bool) -> str:
    if mine == base or (resizable and mine[1:] == base[1:]):
        return ""
    return f"is {list(base)} in the base, {list(mine)} in the adapter"


def _fits(change: ParameterChange, oriented: tuple[int, ...]) -> bool:
    assert change.a is not None and change.b is not None
    ranks = (change.a.shape[1], change.b.shape[0]) if change.embedding else (change.a.shape[0], change.b.shape[1])
    return ranks[0] == ranks[1] and change.shape == oriented
