"""Input embeddings and output layer of a merged model: shared, parted, or longer than the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.models import headers
from tasks.jobs.merging.deltas import ParameterChange
from tasks.jobs.merging.skeleton import Skeleton
from tasks.jobs.merging.streams import Reader
from tasks.runtime.process.errors import StageError

STEP = 1 << 22  # elements compared at once


class Embeddings(NamedTuple):
    """What the merge does with them.

    Attributes:
        changes: The adapter's changes, without those that change nothing.
        untied: Parameter that gets weights of its own -> the parameter whose weights it had.
        dropped: Parameters that are shared from now on and not written.
        vocabulary: Entries, where there are others than in the base.
    """

    changes: dict[str, ParameterChange]
    untied: dict[str, str]
    dropped: frozenset[str]
    vocabulary: int | None


def settle(
    changes: Mapping[str, ParameterChange], skeleton: Skeleton, tensors: Mapping[str, headers.Tensor], reader: Reader
) -> Embeddings:
    """Untie when, and only when, training changed one side of a tied pair.

    Raises:
        StageError: Only one side of an untied pair got new entries.
    """
    kept = dict(changes)
    own = {name: tensors[stored] for name, stored in skeleton.stored.items()}
    sides = [f"{module}.weight" for module in skeleton.embeddings if module]
    for name in sides:
        base = own.get(name) or own.get(skeleton.tied.get(name, ""))
        if name in kept and base is not None and _changes_nothing(kept[name], base, reader):
            del kept[name]
    untied, dropped = {}, set()
    for target, origin in skeleton.tied.items():
        stored, missing = (origin, target) if origin in own else (target, origin)
        mine, other = kept.get(stored), kept.get(missing)
        if mine is None and other is None:
            continue
        if _alike(mine, other, reader) or _resized_alone(mine, other, own[stored]):
            kept[stored] = mine or other or ParameterChange()
            kept.pop(missing, None)
            dropped.add(missing)
        else:
            untied[missing] = stored
    _check_lengths(kept, sides, skeleton, shared=bool(skeleton.tied) and not untied)
    entries = [change.full.shape[0] for name in sides if (change := kept.get(name)) and change.full]
    vocabulary = next((count for count in entries if count != skeleton.shapes[sides[0]][0]), None)
    return Embeddings(kept, untied, frozenset(dropped), vocabulary)


def new_config(config: Mapping[str, Any], embeddings: Embeddings) -> dict[str, Any]:
    """The base's config.json for the merged weights: bf16, and ties and vocabulary as they are now."""
    changed: dict[str, Any] = dict(config)
    parts = [changed]
    if isinstance(changed.get("text_config"), dict):
        changed["text_config"] = dict(changed["text_config"])
        parts.append(changed["text_config"])
    for part in parts:
        for name in {"dtype", "torch_dtype"} & part.keys():
            part[name] = "bfloat16"
        if embeddings.vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = embeddings.vocabulary
        if embeddings.untied:
            part["tie_word_embeddings"] = False
    if not {"dtype", "torch_dtype"} & changed.keys():
        changed["dtype"] = "bfloat16"
    return changed


def _changes_nothing(change: ParameterChange, base: headers.Tensor, reader: Reader) -> bool:
    """A saved copy of the base's own weights: PEFT writes one when it is unsure."""
    return change.a is None and change.full is not None and _same(change.full, base, reader)


def _alike(mine: ParameterChange | None, other: ParameterChange | None, reader: Reader) -> bool:
    if mine is None or other is None or mine.full is None or other.full is None:
        return False
    return mine.a is None and other.a is None and _same(mine.full, other.full, reader)


def _resized_alone(mine: ParameterChange | None, other: ParameterChange | None, base: headers.Tensor) -> bool:
    """Only one side is in the adapter, with more or fewer entries than the base: it must have been tied when saved."""
    alone = mine if other is None else other if mine is None else None
    return alone is not None and alone.full is not None and alone.full.shape[0] != base.shape[0]


def _same(a: headers.Tensor, b: headers.Tensor, reader: Reader) -> bool:
    """Equal in bf16."""
    if a.shape != b.shape:
        return False

    def part(tensor: headers.Tensor, first: int) -> Tensor:
        return reader.read(tensor, first, min(first + STEP, tensor.numel)).to(torch.bfloat16)

    return all(torch.equal(part(a, first), part(b, first)) for first in range(0, a.numel, STEP))


def _check_lengths(kept: Mapping[str, ParameterChange], sides: list[str], skeleton: Skeleton, *, shared: bool) -> None:
    def entries(name: str) -> int:
        change = kept.get(name)
        return (skeleton.shapes[name] if change is None or change.full is None else change.full.shape)[0]

    lengths = {name: entries(name) for name in sides}
    if shared or len(set(lengths.values())) <= 1:
        return
    raise StageError.of(
        what="the adapter has new entries for one of embeddings and output layer only",
        where=", ".join(f"{name}: {count} entries" for name, count in lengths.items()),
        why="the other side's new entries were trained or drawn at random, and are not in the adapter",
        next="save the adapter again with save_embedding_layers=True",
    )
