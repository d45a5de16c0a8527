"""What the archived backends, AutoAWQ and AutoGPTQ, share: both write fp16 and have an environment of their own.

Their files are written here, shard by shard under the input's tensor names, so that transformers finds them as it finds
the input: AutoGPTQ would name its file otherwise, untie tied embeddings and add a bias of zeros to every layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tasks.jobs.backends import LayerRecord, Request, linear_names, note_skipped, note_tokens
from tasks.jobs.backends.rewrite import rewrite, write_configs
from tasks.jobs.merging.rope import older_spelling
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.events import Events

PARTS = ("qweight", "qzeros", "scales", "g_idx")  # of a quantized layer; AWQ has no g_idx


def read_config(model: Path) -> transformers.PretrainedConfig:
    """config.json, also by a transformers before 5, which would not see its rotary parameters.

    Raises:
        StageError: There are parameters that such a version has no words for: one set for each kind of layer.
    """
    config = transformers.AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if int(transformers.__version__.split(".")[0]) >= 5:
        return config
    older = older_spelling(raw)
    if raw.get("rope_parameters") and not older and "rope_theta" not in raw:
        raise StageError.of(
            what=f"transformers {transformers.__version__} cannot read this model's rotary embedding",
            where=str(model / "config.json"),
            why=f"rope_parameters differ by kind of layer: {', '.join(sorted(raw['rope_parameters']))}",
            next="leave the backend out: GPTQModel makes this scheme",
        )
    for name, value in older.items():
        setattr(config, name, value)
    return config


def refuse_overflow(model: nn.Module) -> None:
    """Raise StageError where a weight is beyond fp16's 65,504."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.half()).all():
            raise StageError.of(
                what="a weight does not fit fp16, in which this backend quantizes",
                where=name,
                why="it is larger than 65,504, or it was no finite number before",
                next="check the merged model (quench evaluate), or leave the backend out: GPTQModel works in bf16",
            )


def write_checkpoint(request: Request, state: Mapping[str, Tensor], *, quantization: dict[str, Any]) -> None:
    """Write the quantized model under the input's tensor names, in as many files, with both configs.

    A tensor that was not changed is written as the input has it (bf16), one that was (norms that AWQ scales) in fp16.

    Args:
        request: Its out folder gets the files, its events a note on changed tensors.
        state: state_dict of the quantized model.
        quantization: quantization_config of config.json.

    Raises:
        StageError: The backend made a tensor that the input has no place for.
    """
    changed: list[str] = []
    _refuse_lost(state, rewrite(request.model, request.out, partial(_written, state=state, changed=changed)))
    if changed:
        request.events.note(
            "unquantized tensors", f"{len(changed)} were scaled and are stored in fp16: {', '.join(changed)}"
        )
    write_configs(request.model, request.out, quantization=quantization)


def _written(name: str, original: Tensor, *, state: Mapping[str, Tensor], changed: list[str]) -> dict[str, Tensor]:
    layer = name.removesuffix(".weight")
    if f"{layer}.qweight" in state:
        parts = (f"{layer}.{part}" for part in PARTS)
        return {part: state[part].contiguous() for part in parts if part in state}
    if torch.equal(original.half(), state[name].cpu().half()):
        return {name: original}
    changed.append(name)
    return {name: state[name].half().contiguous()}


def _refuse_lost(state: Mapping[str, Tensor], written: Mapping[str, str]) -> None:
    """AutoGPTQ's zero biases and the second name of tied embeddings may go; nothing else may."""
    kept = {state[name].data_ptr() for name in written if name in state}
    for name, tensor in state.items():
        if name not in written and tensor.data_ptr() not in kept and torch.count_nonzero(tensor):
            raise StageError.of(
                what="the backend made a tensor that the input model does not have",
                where=name,
                why="without it the written model would be another one than the backend quantized",
                next="leave the backend out: GPTQModel makes this scheme",
            )


def note_habits(model: Path, layers: list[LayerRecord], *, tokens: int, events: Events) -> None:
    """Say which layers were not quantized, saw other numbers of tokens, or have no loss."""
    note_skipped(linear_names(model), [layer.name for layer in layers], events=events)
    note_tokens(layers, tokens=tokens, events=events)
    without = [layer.name for layer in layers if layer.loss is None]
    if without:
        events.note("layers without a loss", f"{len(without)}: {', '.join(without)}")
