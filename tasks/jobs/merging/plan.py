"""What a merge writes: every tensor of the merged checkpoint, and where its values come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from recipes.models import headers
from tasks.jobs.merging.deltas import ParameterChange
from tasks.jobs.merging.embeddings import Embeddings
from tasks.jobs.merging.skeleton import Skeleton
from tasks.jobs.merging.streams import DTYPES, PlannedTensor
from tasks.runtime.process.errors import StageError


class MergeItem(NamedTuple):
    """One tensor to write.

    Attributes:
        planned: Its name, type and shape in the merged checkpoint.
        source: Where its values come from, base or adapter.
        module: Name of its module where that was 4-bit in training and the merge goes onto those weights, else "".
        transposed: It is stored [in, out].
        change: What the adapter does to it.
    """

    planned: PlannedTensor
    source: headers.Tensor
    module: str = ""
    transposed: bool = False
    change: ParameterChange | None = None


def merge_items(
    skeleton: Skeleton, tensors: Mapping[str, headers.Tensor], embeddings: Embeddings, *, four_bit: frozenset[str]
) -> list[MergeItem]:
    """Everything that is written, in the order in which the base has it.

    Raises:
        StageError: The base lacks parameters of its architecture.
    """

    def item(written: str, name: str, stored: headers.Tensor) -> MergeItem:
        module, _, leaf = name.rpartition(".")
        change = embeddings.changes.get(name)
        source = change.full if change and change.full else stored
        dtype = skeleton.dtypes[name] if DTYPES[stored.dtype].is_floating_point else DTYPES[stored.dtype]
        return MergeItem(
            planned=PlannedTensor(written, dtype, source.shape),
            source=source,
            module=module if module in four_bit and leaf == "weight" else "",
            transposed=module in skeleton.transposed and leaf == "weight",
            change=change,
        )

    absent = skeleton.shapes.keys() - skeleton.stored.keys() - _shared(skeleton)
    if absent and not skeleton.converted:
        raise StageError.of(
            what=f"{len(absent)} tensor(s) of the base are missing",
            where=", ".join(sorted(absent)),
            why="its architecture (config.json) has them, its weight files do not",
            next="download or write the base again",
        )
    parameter = {stored: name for name, stored in skeleton.stored.items()}
    items = []
    for stored in tensors.values():
        name = parameter.get(stored.name)
        if name is None:  # no parameter of the model, or a part of one that nothing changes: copied
            items.append(MergeItem(PlannedTensor(stored.name, _copied_as(stored, skeleton), stored.shape), stored))
        elif name not in embeddings.dropped:
            items.append(item(stored.name, name, stored))
    for name, origin in embeddings.untied.items():
        if name not in skeleton.stored:
            stored = tensors[skeleton.stored[origin]]
            items.append(item(name, name, stored))
    return items


def _copied_as(stored: headers.Tensor, skeleton: Skeleton) -> torch.dtype:
    """The type of a tensor that nothing changes: a part's is that of its parameter in the model, others keep theirs."""
    dtype = DTYPES[stored.dtype]
    parameter = skeleton.parts.get(stored.name)
    return dtype if parameter is None or not dtype.is_floating_point else skeleton.dtypes[parameter]


def _shared(skeleton: Skeleton) -> set[str]:
    """Tied parameters whose values are stored under the other name."""
    pairs = skeleton.tied.items()
    return {b if a in skeleton.stored else a for a, b in pairs if a in skeleton.stored or b in skeleton.stored}
