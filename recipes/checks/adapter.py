"""An adapter in place of training: what can be refused before anything is spent."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.checks.module_names import names_in_files
from recipes.models.adapters import (
    CONFIG,
    OF_BASE,
    WEIGHTS,
    Adapter,
    plain_name,
    read_adapter,
    saved_part,
    split_key,
    token_indices,
    untrained,
)
from recipes.models.headers import Headers
from recipes.models.weights import Tensor, shown_shape
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded

TOKENS = "token_adapter.trainable_tokens_delta"
TAILS = (
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias"),
    *("lora_magnitude_vector", "lora_magnitude_vector.weight", TOKENS),
)
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_B", "lora_embedding_A"))
EXPERTS = re.compile(r"^(.*\.experts)\.")


def beside_problems(loaded: Loaded) -> Iterator[Problem]:
    """Settings of training beside an adapter: they would have no effect."""
    if loaded.recipe.train.adapter is None:
        return
    for name in sorted(loaded.recipe.train.model_fields_set - {"adapter"}):
        yield Problem(
            what=f"train.{name} stands beside train.adapter.",
            where=f"train.{name}",
            why="The adapter was trained before; nothing is trained here, so settings of a training would be ignored.",
            next=f"Remove train.{name}, or train.adapter to train here.",
        )


def folder_problems(folder: Path) -> list[Problem]:
    """What is wrong with the folder alone: no LoRA, a pickle, a broken file, a base that its start has changed."""
    try:
        adapter = read_adapter(folder)
    except RecipeError as error:
        return list(error.problems)
    if adapter.config["peft_type"] == "LORA":
        return []
    return [
        Problem(
            what=f"The adapter is a {adapter.config['peft_type']}, not a LoRA.",
            where=str(folder / CONFIG),
            why="It has to run on the NF4 base, which every arm is measured against; PEFT puts LoRA alone on NF4.",
            next="Name a LoRA (also rsLoRA or DoRA), or merge this one with PEFT and name the result as model.base.",
        )
    ]


def fit_problems(folder: Path, headers: Headers) -> list[Problem]:
    """Parts of the adapter that fit no tensor of the base, all of them by name; empty where it cannot be read."""
    try:
        adapter = read_adapter(folder)
    except RecipeError:
        return []  # folder_problems reports it
    misfits = list(_misfits(adapter, headers))
    if adapter.tensors and not misfits:
        return []
    return [
        Problem(
            what=f"{len(misfits)} part(s) of the adapter fit no weight of the base."
            if misfits
            else "The adapter holds no tensors.",
            where=f"{folder / WEIGHTS}: {', '.join(misfits) or 'empty'}",
            why="It was trained on another base, or on one with tokens added.",
            next=f"Name the base that it was trained on as model.base; its {CONFIG} says "
            f"{adapter.config.get('base_model_name_or_path') or 'nothing about it'}.",
        )
    ]


def _misfits(adapter: Adapter, headers: Headers) -> Iterator[str]:
    """`name (adapter [out, in], base [out, in])`, or the name alone where the base has no such weight."""
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in adapter.tensors.items():
        if not any(name in key for name in OF_BASE):
            module, tail = split_key(key)
            parts[module][tail] = tensor
    base = _Weights(headers)
    base.rename(names_in_files(headers.folder, [module for module in parts if base.may_be_renamed(module)]))
    for module in sorted(parts):
        yield from base.misfits(module, parts[module], adapter.config)
    adapted = {base.name(module) for module, tensors in parts.items() if any("lora_" in tail for tail in tensors)}
    layers = [layer.name for layer in headers.linears]
    for name in untrained(adapter.config, adapted, layers):
        yield f"{name} (a target by {CONFIG}, not in the file)"


class _Weights:
    """The base's weights by the names that an adapter may have for them."""

    def __init__(self, headers: Headers) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._matrices: dict[str, tuple[int, ...]] = {}
        for name, tensor in headers.tensors.items():
            for spelling in (plain_name(name), name):  # of two with one plain name each keeps its own
                self._tensors.setdefault(spelling, tensor)
            if len(tensor.shape) == 2:
                self._matrices[name.removesuffix(".weight")] = tensor.shape
        if headers.tied:
            self._matrices["lm_head"] = (headers.vocabulary, headers.hidden)
        self._matrices |= {layer.name: (layer.out_features, layer.in_features) for layer in headers.linears}
        self._names = {plain_name(name): name for name in reversed(self._matrices)}
        self._kinds = {_kind(name) for name in self._matrices}
        self._stacks = {plain_name(name.rpartition(".")[0]) for name in headers.tensors}
        self._stacks |= {match[1] for stack in self._stacks if (match := EXPERTS.match(stack))}

    def rename(self, names: Mapping[str, str]) -> None:
        """Take further names of modules, each with that in the base's files."""
        self._names |= {plain_name(module): name for module, name in names.items()}

    def name(self, module: str) -> str:
        """A module's name in the base's files; as it is where it is not there."""
        return module if module in self._matrices else self._names.get(plain_name(module), module)

    def has(self, module: str) -> bool:
        """There is a matrix of this name, or something below it (experts, a norm, a bias)."""
        match = EXPERTS.match(plain_name(module))
        return self.name(module) in self._matrices or (match[1] if match else plain_name(module)) in self._stacks

    def may_be_renamed(self, module: str) -> bool:
        """Neither this module nor one of its kind in another layer is there: transformers may name it otherwise."""
        return not self.has(module) and _kind(module) not in self._kinds

    def misfits(self, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[str]:
        """What of an adapter's tensors for one module, by their tails, does not fit."""
        name = self.name(module)
        base = self._matrices.get(name)
        whole = {tail: tensor for tail, tensor in tensors.items() if tail not in TAILS}
        for tail, tensor in whole.items():
            yield from self._whole(module, tail, tensor)
        if len(whole) == len(tensors):
            return
        if base is None:
            if not (self.has(module) and EXPERTS.match(f"{plain_name(module)}.")):  # those PEFT puts in their place
                yield module
            return
        if wrong := _unpaired(tensors):
            yield f"{module} ({wrong})"
        elif (mine := _shape(tensors)) is not None and mine != base:
            yield f"{module} (adapter {list(mine)}, base {list(base)})"
        yield from _rows(module, tensors, base, config)

    def _whole(self, module: str, tail: str, tensor: Tensor) -> Iterator[str]:
        """A weight that was trained in full (modules_to_save, bias) and does not fit."""
        leaf = saved_part(tail)
        full, name = f"{module}.{leaf}", self.name(module)
        base = self._tensors.get(f"{name}.{leaf}") or self._tensors.get(plain_name(full))
        shape = base.shape if base else self._matrices.get(name) if leaf == "weight" else None
        if shape is None:
            yield full
        elif shape != tensor.shape:
            yield f"{full} (adapter {list(tensor.shape)}, base {list(shape)})"


def _kind(module: str) -> str:
    """The plain name without numbers: one for all layers."""
    return re.sub(r"\d+", "*", plain_name(module))


def _unpaired(tensors: Mapping[str, Tensor]) -> str:
    """Why the tensors of a LoRA make no product, or nothing."""
    for first, last in PAIRS:
        if first in tensors and last in tensors:
            a, b = tensors[first].shape, tensors[last].shape
            if len(a) != 2 or len(b) != 2:
                return f"its LoRA is no pair of matrices: {shown_shape(a)} and {shown_shape(b)}"
            inner = (a[0], b[1]) if first == "lora_A.weight" else (a[1], b[0])
            return f"the ranks of its LoRA differ: {inner[0]} and {inner[1]}" if inner[0] != inner[1] else ""
    return "a part of its LoRA is missing" if any("lora_" in tail for tail in tensors) else ""


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """[out, in] of B @ A; of an embedding [entries, dim]. None where one of them is missing."""
    for first, last in PAIRS:
        if first in tensors and last in tensors:
            a, b = tensors[first].shape, tensors[last].shape
            return (b[0], a[1]) if first == "lora_A.weight" else (b[1], a[0])
    return None


def _rows(name: str, tensors: Mapping[str, Tensor], base: tuple[int, ...], config: Mapping[str, Any]) -> Iterator[str]:
    """Parts with one entry for each output, and rows of tokens, that do not fit."""
    for tail in ("lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight"):
        if tail in tensors and tensors[tail].numel != base[0]:
            yield f"{name}.{tail} (adapter {list(tensors[tail].shape)}, base {[base[0]]})"
    if (rows := tensors.get(TOKENS)) is not None:
        tokens = token_indices(config, name)
        if rows.shape != (len(tokens), base[1]) or max(tokens, default=0) >= base[0]:
            yield f"{name} (adapter {list(rows.shape)}, rows of tokens {list(tokens)}; base {list(base)})"
