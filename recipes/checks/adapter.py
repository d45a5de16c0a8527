"""An adapter in place of training: what can be refused before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from recipes.models.adapters import CONFIG, WEIGHTS, Adapter, read_adapter
from recipes.models.headers import Headers
from recipes.models.weights import Tensor
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded

PREFIX = "base_model.model."  # PEFT's, before the base's own module names
PARTS = (".lora_A.weight", ".lora_B.weight")


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
    shapes = _shapes(headers)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
    for module in sorted({name.rpartition(".lora_")[0] for name in tensors if name.endswith(PARTS)}):
        a, b = (tensors.get(f"{module}{part}") for part in PARTS)
        of_base = _known(module, shapes)
        if of_base is None or a is None or b is None:
            yield module
        elif (of_adapter := (*b.shape[:1], *a.shape[1:])) != of_base:
            yield f"{module} (adapter {list(of_adapter)}, base {list(of_base)})"
    for name in sorted(name for name in tensors if ".lora_" not in name):
        yield from _whole(name, tensors[name], headers)


def _shapes(headers: Headers) -> dict[str, tuple[int, ...]]:
    """[out, in] of every 2-D weight by module name; a tied output layer has the shape of the embeddings."""
    shapes = {
        name.removesuffix(".weight"): tensor.shape for name, tensor in headers.tensors.items() if len(tensor.shape) == 2
    }
    if headers.tied:
        shapes["lm_head"] = (headers.vocabulary, headers.hidden)
    return shapes | {layer.name: (layer.out_features, layer.in_features) for layer in headers.linears}


def _known(module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """A checkpoint of the bare model lacks the first part of the names (`model.`, `transformer.`)."""
    return shapes.get(module, shapes.get(module.partition(".")[2]))


def _whole(name: str, tensor: Tensor, headers: Headers) -> Iterator[str]:
    """A weight that was trained in full (modules_to_save, bias) and does not fit."""
    plain = name.replace(".modules_to_save", "").replace(".base_layer", "")
    base = headers.tensors.get(plain) or headers.tensors.get(plain.partition(".")[2])
    if base is None:
        if not (headers.tied and plain.startswith("lm_head.")):
            yield plain
    elif base.shape != tensor.shape:
        yield f"{plain} (adapter {list(tensor.shape)}, base {list(base.shape)})"
