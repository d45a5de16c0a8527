"""GPTQ and AWQ through llm-compressor 0.14 into the compressed-tensors format, in the environment llmcompressor.

What it does without saying so: by default it shuffles the rows and takes 512 of them (ours come as a DataLoader, which
it leaves alone), orders GPTQ's columns by activation (asked for here: the file stays in plain order), sets weights to 0
whose input never fires, rounds a layer to nearest where the Hessian does not factor, and skips AWQ's scales where
shapes do not fit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import nn
from torch.utils.data import DataLoader

from recipes.models.linear import Linear
from recipes.schemes.scheme import FUSED, Grid, Scheme
from tasks.jobs.backends import Quantized, Request, linear_names
from tasks.jobs.backends.llm_compressor_watch import Watch
from tasks.jobs.loading.load import load_bf16
from tasks.runtime.process.errors import StageError


def quantize(request: Request) -> Quantized:
    """Quantize and save; llm-compressor takes one decoder layer at a time onto the GPU that it sees.

    Raises:
        StageError: A linear layer of the checkpoint is not one in the loaded model.
    """
    os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"  # warnings become notes, which print themselves
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]

    from tasks.jobs.backends.llm_compressor_modifiers import modifiers, watched

    scheme, damp = Scheme.of(request.params, slug=""), request.params.get("damp")
    loaded = load_bf16(request.model, device="cpu")
    names = linear_names(request.model)
    ignored = _ignored(loaded, scheme, names)
    watch = Watch(request.events, layers=loaded.config.get_text_config().num_hidden_layers, device=request.device)
    samples = [{"input_ids": torch.tensor([list(row)])} for row in request.rows]
    with watched(watch):
        oneshot(
            model=loaded,
            dataset=DataLoader(samples, batch_size=None),  # pyright: ignore[reportArgumentType]
            recipe=modifiers(scheme, targets(scheme, names), ignored, damp=damp, watch=watch),
        )
        loaded.save_pretrained(request.out, save_compressed=True)
    layers = [watch.record(name, scheme, damp=damp) for name in names if scheme.grid_of(name)]
    watch.note_habits(ignored, layers, tokens=request.tokens)
    return Quantized(
        backend=f"llm-compressor:{version('llmcompressor')}",
        packer=f"compressed-tensors:{version('compressed-tensors')}",
        layers=layers,
    )


def _ignored(model: nn.Module, scheme: Scheme, names: Sequence[str]) -> list[str]:
    """Linear modules that the scheme does not quantize: lm_head, routers.

    Raises:
        StageError: A layer of the checkpoint is not a linear module in the loaded model.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [name for name in names if name not in linear and scheme.grid_of(name)]:
        raise StageError.of(
            what=f"{len(missing)} linear layers of the checkpoint are not linear layers in the loaded model",
            where=missing[0],
            why="transformers holds them as one fused or transposed weight, which llm-compressor does not quantize",
            next="take a gptq- or awq- scheme, or keep these layers in bf16 by a rule with keep: true",
        )
    return sorted(linear - set(names))


def targets(scheme: Scheme, names: Sequence[str]) -> dict[Grid, list[str]]:
    """The layers of every grid as compressed-tensors names them; without rules the class, which means all.

    With rules each grid gets regular expressions that no other grid's layers match, and that also match the fused name
    (qkv_proj) under which a server loads q, k and v.
    """
    if not scheme.rules:
        return {scheme.grid: ["Linear"]}
    by_grid: dict[Grid, list[str]] = {}
    for name in names:
        grid = scheme.grid_of(name)
        if grid is not None:
            by_grid.setdefault(grid, []).append(name)
    return {grid: _patterns(layers, names) for grid, layers in by_grid.items()}


def _patterns(layers: Sequence[str], names: Sequence[str]) -> list[str]:
    """`layers` in few regular expressions: one for all decoder layers where they agree, else one per layer."""
    chosen, every = _parts(layers), _parts(names)
    choices: dict[str, set[frozenset[str]]] = {}
    for parent in every:
        choices.setdefault(Linear(parent, 0, 0).family, set()).add(frozenset(chosen.get(parent, ())))
    patterns: dict[str, None] = {}
    for parent, parts in chosen.items():
        family = Linear(parent, 0, 0).family
        stem = re.escape(family).replace(r"\*", r"\d+") if len(choices[family]) == 1 else re.escape(parent)
        fused = [name for name, all_of in FUSED.items() if set(all_of) <= set(parts)]
        patterns[f"re:{stem}\\.({'|'.join([*parts, *fused])})$"] = None
    return list(patterns)


def _parts(names: Sequence[str]) -> dict[str, list[str]]:
    """Parent module -> last components, in order."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parent, _, part = name.rpartition(".")
        parts.setdefault(parent, []).append(part)
    return parts
