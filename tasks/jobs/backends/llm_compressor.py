"""GPTQ and AWQ through llm-compressor 0.14 into the compressed-tensors format, in the environment llmcompressor.

What it does without saying so: by default it shuffles the rows and takes 512 of them (ours come as a DataLoader, which
it leaves alone), orders GPTQ's columns by activation (asked for here: the file stays in plain order), sets weights to 0
whose input never fires, rounds a layer to nearest where the Hessian does not factor, and skips AWQ's scales where
shapes do not fit.

A mixture's experts, which transformers holds as one 3-D weight, it takes apart into linear layers (`linearize_moe`):
every expert sees every token of the calibration set (`moe_calibrate_all_experts`), and the file has them one by one,
as `mlp.experts.0.gate_proj`. transformers 5.23 puts them together again when it loads the file, unless there are zero
points (AWQ, -asym): then it raises.

On CUDA the model is loaded on the host; flows/plan/quantizers.py says what goes to the GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from recipes.models.linear import Linear
from recipes.schemes.scheme import FUSED, Grid, Scheme
from tasks.jobs.backends import Quantized, Request, linear_names
from tasks.jobs.backends.llm_compressor_watch import Watch
from tasks.jobs.backends.names import linear_layers, linear_modules
from tasks.jobs.loading.load import load_bf16
from tasks.jobs.loading.names import modules_of


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
    experts = take_apart(loaded)
    names = linear_names(request.model)
    modules = linear_modules(loaded, [name for name in names if scheme.grid_of(name)], backend="llm-compressor")
    stored = modules_of(loaded, names)
    every = list(dict.fromkeys([*(stored.get(name, name) for name in names), *experts]))
    modules |= {name: name for name in experts if name not in stored.values() and scheme.grid_of(name)}
    watch = Watch(request.events, layers=loaded.config.get_text_config().num_hidden_layers, device=request.device)
    ignored = sorted(linear_layers(loaded) - set(every))  # lm_head, routers, towers
    samples = [{"input_ids": torch.tensor([list(row)])} for row in request.rows]
    with watched(watch):
        oneshot(
            model=loaded,
            dataset=DataLoader(samples, batch_size=None),  # pyright: ignore[reportArgumentType]
            # It asks for one and uses none here; a vision-language base's own would need torchvision.
            processor=AutoTokenizer.from_pretrained(str(request.model), local_files_only=True),
            recipe=modifiers(
                scheme,
                targets(scheme, every),
                ignored,
                damp=damp,
                watch=watch,
                offload=torch.device("cpu") if request.device == "cuda" else None,
            ),
        )
        loaded.save_pretrained(request.out, save_compressed=True)
    layers = [replace(watch.record(module, scheme, damp=damp), name=name) for name, module in modules.items()]
    watch.note_habits(ignored, layers, tokens=request.tokens)
    return Quantized(
        backend=f"llm-compressor:{version('llmcompressor')}",
        packer=f"compressed-tensors:{version('compressed-tensors')}",
        layers=layers,
    )


def take_apart(model: PreTrainedModel) -> list[str]:
    """Make linear layers of a mixture's experts, in place; returns their names."""
    from llmcompressor.modeling.moe.linearize import linearize_moe  # pyright: ignore[reportMissingImports]

    before = linear_layers(model)
    linearize_moe(model)
    return sorted(linear_layers(model) - before, key=dot_natural_key)


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
