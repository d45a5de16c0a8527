"""GPTQ and AWQ through llm-compressor 0.14 into the compressed-tensors format, in the environment llmcompressor.

What it does without saying so: by default it shuffles the rows and takes 512 of them (ours come as a DataLoader, which
it leaves alone), orders GPTQ's columns by activation (asked for here: the file stays in plain order), sets weights to 0
whose input never fires, rounds a layer to nearest where the Hessian does not factor, and skips AWQ's scales where
shapes do not fit.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from recipes.models.headers import read_headers
from recipes.models.linear import Linear
from recipes.problem import Problem
from recipes.schemes.scheme import FUSED, Grid, Scheme
from tasks.jobs.backends import LayerRecord, Quantized, note_tokens
from tasks.jobs.loading.load import load_bf16
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.events import Events


class Watch:
    """What one call said, by layer name.

    Attributes:
        losses: GPTQ: sum of squared errors over the inverse Hessian's diagonal; AWQ: mean squared error of the block's
            output at the scales that were chosen.
        tokens: Calibration tokens that entered the statistics.
        dead: Inputs whose Hessian diagonal was 0.
        rounded: Layers whose Hessian did not factor.
    """

    def __init__(self, events: Events, *, layers: int, device: str) -> None:
        self.losses: dict[str, float] = {}
        self.tokens: Counter[str] = Counter()
        self.dead: dict[str, int] = {}
        self.rounded: list[str] = []
        self._events, self._layers, self._done = events, layers, 0
        self._said = {"No accelerator available! Compressing model on CPU instead"} if device == "cpu" else set[str]()

    def layer_done(self) -> None:
        """A decoder layer is done; the last part, behind them, holds nothing to quantize."""
        self._done += 1
        self._events.progress(min(self._done, self._layers), self._layers, unit="layer")

    def said(self, message: Any) -> None:
        """A line of its log becomes a note, once; its level METRIC stands above WARNING."""
        text = message.record["message"]
        if message.record["level"].name != "METRIC" and text not in self._said:
            self._said.add(text)
            self._events.note("llm-compressor", text)


def quantize(
    model: Path, out: Path, *, rows: Sequence[Sequence[int]], params: dict[str, Any], device: str, events: Events
) -> Quantized:
    """Quantize and save.

    Args:
        model: bf16 model folder.
        out: Gets model*.safetensors, config.json, and files that the caller replaces.
        rows: Token ids of the calibration sequences, without padding.
        params: The scheme's, with damp for GPTQ.
        device: `cpu` or `cuda`: llm-compressor takes the GPU that it sees, and one decoder layer at a time onto it.
        events: Gets progress by decoder layer, and a note for every silent habit that showed.

    Raises:
        StageError: A linear layer of the checkpoint is none in the loaded model.
    """
    os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"  # warnings become notes, which print themselves
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]

    from tasks.jobs.backends.llm_compressor_modifiers import modifiers, watched

    scheme = Scheme.of(params, slug="")
    loaded = load_bf16(model, device="cpu")
    names = [layer.name for layer in read_headers(model).linears]
    others = _others(loaded, scheme, names)
    watch = Watch(events, layers=loaded.config.get_text_config().num_hidden_layers, device=device)
    samples = [{"input_ids": torch.tensor([list(row)])} for row in rows]
    with watched(watch):
        oneshot(
            model=loaded,
            dataset=DataLoader(samples, batch_size=None),  # pyright: ignore[reportArgumentType]
            recipe=modifiers(scheme, targets(scheme, names), others, damp=params.get("damp"), watch=watch),
        )
        loaded.save_pretrained(out, save_compressed=True)
    layers = [_record(name, watch, scheme, damp=params.get("damp")) for name in names if scheme.grid_of(name)]
    _note_habits(watch, others, layers, events=events, tokens=sum(map(len, rows)))
    return Quantized(
        backend=f"llm-compressor:{version('llmcompressor')}",
        packer=f"compressed-tensors:{version('compressed-tensors')}",
        layers=layers,
    )


def _others(model: nn.Module, scheme: Scheme, names: Sequence[str]) -> list[str]:
    """Linear modules that the scheme does not quantize: lm_head, routers.

    Raises:
        StageError: A layer of the checkpoint is no linear module here.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [name for name in names if name not in linear and scheme.grid_of(name)]:
        raise StageError(
            Problem(
                what=f"{len(missing)} linear layers of the checkpoint are none in the loaded model.",
                where=missing[0],
                why="transformers holds them as one fused or transposed weight, which llm-compressor does not quantize",
                next="take a gptq- or awq- scheme, or keep these layers in bf16 by a rule with keep: true",
            )
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
    return {grid: _patterns(found, names) for grid, found in by_grid.items()}


def _patterns(found: Sequence[str], names: Sequence[str]) -> list[str]:
    """`found` as few regular expressions: one for all decoder layers where they agree, else one a layer."""
    chosen, every = _parts(found), _parts(names)
    alike: dict[str, set[frozenset[str]]] = {}
    for parent in every:
        alike.setdefault(Linear(parent, 0, 0).family, set()).add(frozenset(chosen.get(parent, ())))
    patterns: dict[str, None] = {}
    for parent, parts in chosen.items():
        family = Linear(parent, 0, 0).family
        stem = re.escape(family).replace(r"\*", r"\d+") if len(alike[family]) == 1 else re.escape(parent)
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


def _record(name: str, watch: Watch, scheme: Scheme, *, damp: float | None) -> LayerRecord:
    return LayerRecord(
        name=name,
        loss=None if name in watch.rounded else watch.losses.get(name),
        tokens=watch.tokens.get(name),
        damp=damp if scheme.method == "gptq" and name not in watch.rounded else None,
    )


def _note_habits(
    watch: Watch, others: Sequence[str], layers: Sequence[LayerRecord], *, events: Events, tokens: int
) -> None:
    """What was left out, rounded or set to zero."""
    if left := [name for name in others if name != "lm_head"]:
        events.note("skipped modules", f"{len(left)} linear layers stay in bf16: {', '.join(left)}")
    if watch.rounded:
        events.note("rounded to nearest", f"the Hessian of {len(watch.rounded)} layers did not factor: {watch.rounded}")
    if watch.dead:
        events.note("dead inputs", f"inputs that were always 0, whose weights are written as 0: {watch.dead}")
    note_tokens(layers, tokens=tokens, events=events)
    if silent := [layer.name for layer in layers if layer.loss is None and layer.name not in watch.rounded]:
        events.note("layers without a loss", f"{len(silent)} that AWQ rounds unscaled: {', '.join(silent)}")
