"""Input embeddings and output layer of a merged model: shared, parted, or longer than the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.models import headers
from tasks.jobs.merging.deltas import ParameterChange
from tasks.jobs.merging.rope import older_spelling
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
        tied: In the merged model the output layer shares the weights of the input embeddings.
        two: The base's config.json ties them, and its files hold two different matrices.
    """

    changes: dict[str, ParameterChange]
    untied: dict[str, str]
    dropped: frozenset[str]
    vocabulary: int | None
    tied: bool
    two: bool


def settle(
    changes: Mapping[str, ParameterChange], skeleton: Skeleton, tensors: Mapping[str, headers.Tensor], reader: Reader
) -> Embeddings:
    """Tie what is equal, part what is not; whatever config.json said.

    transformers ties two matrices of a checkpoint where config.json says so and they are equal; engines that read
    config.json alone (vLLM) take the input embeddings for both. So of equal ones the second is not written, and of
    different ones config.json says that they are two.

    Raises:
        StageError: Only one side of an untied pair got new entries.
    """
    kept = dict(changes)
    own = {name: tensors[stored] for name, stored in skeleton.stored.items()}
    sides = [f"{module}.weight" for module in skeleton.embeddings if module]
    pairs = {a: b for a, b in skeleton.tied.items() if not _are_two(own.get(a), own.get(b), reader)}
    for name in sides:
        base = own.get(name) or own.get(pairs.get(name, ""))
        if name in kept and base is not None and _changes_nothing(kept[name], base, reader):
            del kept[name]
    untied, dropped = {}, set()
    for target, origin in pairs.items():
        stored, missing = (origin, target) if origin in own else (target, origin)
        mine, other = kept.get(stored), kept.get(missing)
        if mine is None and other is None:
            dropped |= {missing} & own.keys()
        elif _alike(mine, other, reader) or _for_both(kept, own[stored], pair=(stored, missing), input_side=sides[0]):
            kept[stored] = mine or other or ParameterChange()
            kept.pop(missing, None)
            dropped.add(missing)
        else:
            untied[missing] = stored
    _check_lengths(kept, sides, skeleton, shared=bool(pairs) and not untied)
    entries = [change.full.shape[0] for name in sides if (change := kept.get(name)) and change.full]
    vocabulary = next((count for count in entries if count != skeleton.shapes[sides[0]][0]), None)
    tied = any(set(pair) == set(sides) and untied.keys().isdisjoint(pair) for pair in pairs.items())
    return Embeddings(kept, untied, frozenset(dropped), vocabulary, tied, two=len(pairs) < len(skeleton.tied))


def new_config(config: Mapping[str, Any], *, tied: bool, vocabulary: int | None = None) -> dict[str, Any]:
    """The base's config.json for the merged weights: bf16, ties and vocabulary as they are now, RoPE in both spellings.

    Ties are said at the top, which transformers reads, and in text_config, which engines read.

    Args:
        config: The base's.
        tied: The output layer shares the weights of the input embeddings.
        vocabulary: Entries, where there are others than in the base.
    """
    changed: dict[str, Any] = dict(config)
    parts = [changed]
    if isinstance(changed.get("text_config"), dict):
        changed["text_config"] = dict(changed["text_config"])
        parts.append(changed["text_config"])
    for part in parts:
        for name in {"dtype", "torch_dtype"} & part.keys():
            part[name] = "bfloat16"
        if vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = vocabulary
        part["tie_word_embeddings"] = tied
        part.update(older_spelling(part))
    if not {"dtype", "torch_dtype"} & changed.keys():
        changed["dtype"] = "bfloat16"
    return changed


def _are_two(a: headers.Tensor | None, b: headers.Tensor | None, reader: Reader) -> bool:
    """Both are in the checkpoint, and differ."""
    return a is not None and b is not None and not _same(a, b, reader)


def _changes_nothing(change: ParameterChange, base: headers.Tensor, reader: Reader) -> bool:
    """A saved copy of the base's own weights: PEFT writes one when it is unsure."""
    return change.a is None and change.rows is None and change.full is not None and _same(change.full, base, reader)


def _alike(mine: ParameterChange | None, other: ParameterChange | None, reader: Reader) -> bool:
    if mine is None or other is None or mine.full is None or other.full is None:
        return False
    return mine.whole_or_nothing and other.whole_or_nothing and _same(mine.full, other.full, reader)


def _for_both(
    kept: Mapping[str, ParameterChange], base: headers.Tensor, *, pair: tuple[str, str], input_side: str
) -> bool:
    """Only one side of a tied pair is in the adapter, and it was trained as both.

    That is so of a matrix with more or fewer entries than the base's, which was tied when it was saved, and of trained
    rows of the input embeddings: PEFT lets the output layer have them, too (set_additional_trainable_modules).
    """
    names = [name for name in pair if name in kept]
    if len(names) != 1:
        return False
    alone = kept[names[0]]
    if alone.rows is not None:
        return names[0] == input_side
    return alone.full is not None and alone.full.shape[0] != base.shape[0]


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
