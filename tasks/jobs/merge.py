"""Adapter into the base: onto the NF4 weights that were trained, dequantized, or onto the original bf16 ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.problem import Problem
from tasks.jobs.backends.load import load_bf16, load_nf4, setup
from tasks.runtime.errors import StageError
from tasks.runtime.job import Job

PREFIX = "base_model.model."  # PEFT's, before the base's own module names
# Settings of a PEFT config that make an adapter more than W + alpha / r * B @ A with one alpha and r.
MORE = (
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)


def run(job: Job) -> dict[str, Any]:
    """Merge and save a plain Hugging Face folder.

    Reads:
        base: model folder. adapter: PEFT folder with tokenizer/.
    Writes:
        config.json, model*.safetensors (bf16), and from adapter/tokenizer/ byte for byte: tokenizer files,
        chat template, generation_config.json.
    Metrics:
        None.

    Raises:
        StageError: More than plain LoRA, an adapter of another base, inf or NaN in a merged weight.
    """
    setup(job)
    base, adapter, onto = job.inputs["base"].path, job.inputs["adapter"].path, job.params["onto"]
    scale = _scale(adapter / "adapter_config.json")
    if onto == "dequantized":
        model = load_nf4(base, device=job.execution.device).dequantize()
    else:
        model = load_bf16(base, device=job.execution.device)
    layers = _layers(model, adapter / "adapter_model.safetensors")
    for done, (name, (layer, a, b)) in enumerate(layers.items(), start=1):
        layer.weight.data = merged(layer.weight.data, a, b, scale=scale)
        if not torch.isfinite(layer.weight).all():
            raise StageError(
                Problem(
                    what="the merged weights hold inf or NaN",
                    where=name,
                    why="the adapter's training diverged, or its file is damaged",
                    next="look at train/loss of the adapter; train again with a lower train.learning_rate",
                )
            )
        job.events.progress(done, len(layers), unit="layer")
    model.save_pretrained(job.out)
    for path in (adapter / "tokenizer").iterdir():
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, job.out / path.name)
    job.events.note("merge", f"{len(layers)} layers onto the {onto} base, delta added in fp32, rounded to bf16 once")
    return {"onto": onto, "layers": len(layers), "parameters": model.num_parameters()}


def merged(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """W[out, in] + scale * B[out, r] @ A[r, in], summed in fp32 and rounded once to W's type (bf16)."""
    delta = scale * b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
    return (weight.float() + delta).to(weight.dtype)


def _scale(path: Path) -> float:
    """Alpha / r of a plain LoRA adapter.

    Raises:
        StageError: The adapter is more than that.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    more = [name for name in MORE if config.get(name)]
    if config["peft_type"] != "LORA" or config.get("bias", "none") != "none" or more:
        raise StageError(
            Problem(
                what=f"this {config['peft_type']} adapter cannot be merged: {', '.join(more) or 'not plain LoRA'}",
                where=str(path),
                why="the merge adds alpha / r * B @ A to linear layers, and this adapter holds more than that",
                next="train it as plain LoRA",
            )
        )
    return config["lora_alpha"] / config["r"]


def _shape(a: Tensor, b: Tensor) -> tuple[int, int]:
    """[out, in] of the layer that A [r, in] and B [out, r] belong to."""
    return b.shape[0], a.shape[1]


def _layers(model: nn.Module, path: Path) -> dict[str, tuple[nn.Linear, Tensor, Tensor]]:
    """Every adapted layer by name, with its A [r, in] and B [out, r].

    Raises:
        StageError: A tensor belongs to no linear layer of this base, or its shape does not fit.
    """
    tensors = load_file(path)
    modules = dict(model.named_modules())
    layers, strange = {}, []
    for key in sorted({key.rpartition(".lora_")[0] for key in tensors}):
        layer = modules.get(key.removeprefix(PREFIX))
        a, b = tensors.pop(f"{key}.lora_A.weight", None), tensors.pop(f"{key}.lora_B.weight", None)
        if not isinstance(layer, nn.Linear) or a is None or b is None or _shape(a, b) != layer.weight.shape:
            strange.append(key.removeprefix(PREFIX))
        else:
            layers[key.removeprefix(PREFIX)] = (layer, a, b)
    if strange or tensors or not layers:
        raise StageError(
            Problem(
                what=f"{len(strange) + len(tensors)} part(s) of the adapter fit no linear layer of this base",
                where=f"{path}: {', '.join([*strange, *sorted(tensors)]) or 'it is empty'}",
                why="it was trained on another base, and a part of it would be lost in silence",
                next="merge it into the base that it was trained on",
            )
        )
    return layers
