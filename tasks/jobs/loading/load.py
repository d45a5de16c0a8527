"""Loads every kind of arm into transformers: bf16, NF4 as in training, or a quantized checkpoint.

Local folders and safetensors only; code from a checkpoint is run of an external model whose recipe asks for it alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig, PreTrainedModel
from transformers.quantizers.quantizer_awq import AwqQuantizer

from tasks.jobs.loading.attach import attach
from tasks.jobs.loading.bf16 import setup_bf16
from tasks.jobs.loading.classes import empty_model, modules_to_skip, name_backbone, read_class
from tasks.jobs.loading.cpu_nf4 import note_other_scales
from tasks.jobs.loading.environment import tame_gptqmodel
from tasks.jobs.loading.kernels import Note, choose_kernel
from tasks.jobs.loading.packed import packed_as_stored
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

if TYPE_CHECKING:  # PEFT and bitsandbytes add about a quarter to the import time: arms that need neither don't pay
    from bitsandbytes.nn.modules import Linear4bit
    from peft import PeftModel

Kind = Literal["bf16", "nf4", "quantized", "external"]


def setup(job: Job) -> None:
    """Threads of the lease, seeds, kernels for bf16, quiet loggers. Every job that imports torch calls it first."""
    torch.set_num_threads(job.execution.threads)
    seed = int(job.params.get("seed", 0))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    setup_bf16(job)
    if job.execution.log_level != "DEBUG":
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # a kernel named by load_arm
        # One line per layer and forward pass: int8 layers get fp16 inputs; quantize notes it once.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def load_bf16(folder: Path, *, device: str) -> PreTrainedModel:
    """An unquantized checkpoint in bf16, eval mode.

    Raises:
        StageError: No safetensors in the folder.
    """
    return _load(folder, device=device)


def load_nf4(folder: Path, *, device: str, attention: str | None = None, sharded: bool = False) -> PreTrainedModel:
    """The base as QLoRA trains it: NF4 with double quantization, bf16 compute.

    The linear layers of the text decoder are 4-bit; embeddings, output layer, towers and routers stay bf16.

    bitsandbytes repacks a layer for an AVX512-BF16 kernel in the first eval-mode forward. That kernel has no
    backward and rounds the nested absmax to bf16 (25 % of the weights change), so it is switched off: weights and
    gradients stay the same before and after an evaluation.

    Args:
        folder: Model folder.
        device: `cpu` or `cuda`.
        attention: transformers' attn_implementation; None leaves the choice to it.
        sharded: For FSDP, which flattens parameters of one type only: 4-bit codes are stored as bf16 words. Every
            rank reads the whole base onto its own GPU, because transformers 5.23 has no loading by rank 0 alone for
            quantized models; FSDP cuts it up when training starts. Until then each GPU holds all of the 4-bit base,
            its unquantized parts, and the bf16 tensor that is being quantized.

    Raises:
        StageError: No safetensors in the folder; no class that makes text.
    """
    config = BitsAndBytesConfig(
        llm_int8_skip_modules=modules_to_skip(empty_model(folder)),
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
    )
    extra: dict[str, Any] = {"quantization_config": config}
    if attention is not None:
        extra["attn_implementation"] = attention
    return _load(folder, device=device, **extra)


def load_int8(folder: Path, *, device: str) -> PreTrainedModel:
    """A bf16 model quantized to LLM.int8() while it is loaded: the linear layers of the text decoder.

    Raises:
        StageError: No safetensors in the folder; no class that makes text.
    """
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=modules_to_skip(empty_model(folder)))
    return _load(folder, device=device, quantization_config=config)


def linear4bit(model: nn.Module) -> dict[str, Linear4bit]:
    """The bitsandbytes 4-bit layers by name, without PEFT's wrappers around them."""
    from bitsandbytes.nn.modules import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def load_arm(
    kind: Kind,
    folder: Path,
    *,
    device: str,
    adapter: Path | None = None,
    trusted: bool = False,
    attention: str | None = None,
    note: Note = lambda about, text: print(f"{about}: {text}", flush=True),
) -> PreTrainedModel | PeftModel:
    """An arm as it is shipped: bf16, NF4 or quantized checkpoint, with the adapter on top if there is one.

    Args:
        kind: `bf16`, `nf4` (quantized while loading), `quantized` (the checkpoint's own quantization_config;
            `kernel_of` names the kernel) or `external` (whatever its config.json says).
        folder: Model folder.
        device: `cpu` or `cuda`.
        adapter: PEFT folder or None.
        trusted: Code in the folder of an external model may run.
        attention: transformers' attn_implementation of a bf16 arm; None leaves the choice to it.
        note: Called where another kernel than the usual one was taken, with the reason.

    Raises:
        StageError: No safetensors in a folder, weights that are missing there, or kind and checkpoint contradict each
            other.
    """
    if kind == "external":
        return _load_external(folder, device=device, trusted=trusted, note=note)
    if kind == "nf4":
        model = load_nf4(folder, device=device)
    elif kind == "quantized":
        model = _load_quantized(folder, device=device, note=note)
    else:
        extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        model = _load(folder, device=device, **extra)
    if (kind != "bf16") != bool(getattr(model, "is_quantized", False)):
        raise StageError.of(
            what=f"{folder.name} was to be loaded as {kind}",
            where=str(folder / "config.json"),
            why="its quantization_config says otherwise, and its figures would be reported under the wrong name",
            next="name an unquantized model for bf16 and nf4, a quantized one for quantized",
        )
    if kind != "bf16":
        note_other_scales(model, note)
    return attach(model, adapter) if adapter else model


def _load_external(folder: Path, *, device: str, trusted: bool, note: Note) -> PreTrainedModel:
    """A checkpoint from elsewhere, in the type of its files; a quantized one computes in bf16 like every other arm."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        return _load_quantized(folder, device=device, note=note)
    return _load(folder, device=device, whole=True, dtype="auto", trust_remote_code=trusted)


def _load_quantized(folder: Path, *, device: str, note: Note) -> PreTrainedModel:
    """A quantized checkpoint by its format's own loader, on the kernel of `choose_kernel`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config", {})
    method = stored.get("quant_method")
    if method == "compressed-tensors":
        from tasks.jobs.loading.compressed import packed_zero_points, unpack

        with packed_zero_points():
            model = _load(folder, device=device)
        unpack(model)
        return model
    if method not in ("gptq", "awq"):
        return _load(folder, device=device)
    tame_gptqmodel()
    kernel = choose_kernel(stored, device=device, note=note)
    extra: dict[str, Any] = {}
    if kernel is not None:  # of this config transformers takes the kernel alone; the rest is the checkpoint's
        config_class: Any = GPTQConfig if method == "gptq" else AwqConfig  # the stub knows no kernel by its word
        extra["quantization_config"] = config_class(bits=4, backend=kernel)
    _refuse_pickles(folder)
    with awq_in_bf16(), packed_as_stored(folder, method):
        return _load(folder, device=device, **extra)


@contextlib.contextmanager
def awq_in_bf16() -> Iterator[None]:
    """Leaves AWQ models in bf16 like every other arm: transformers casts them to fp16 wherever CUDA is, with a warning.

    That is from when AWQ's kernels knew fp16 alone. In fp16 the model would overflow where bf16 does not.
    """
    cast = AwqQuantizer.update_dtype
    AwqQuantizer.update_dtype = lambda self, dtype: dtype
    try:
        yield
    finally:
        AwqQuantizer.update_dtype = cast


def _refuse_missing(names: list[str], folder: Path) -> None:
    """Refuse weights that are missing: transformers would fill them with random numbers, and log a warning."""
    if names:
        raise StageError.of(
            what=f"{len(names)} weights of the model are not in the checkpoint: {', '.join(names[:5])}",
            where=str(folder),
            why="transformers would use random numbers in their place; packed experts of mixtures are such a case",
            next="write another scheme for this model (quench schemes lists them); of an external model, name a "
            "folder that is whole",
        )


def _refuse_pickles(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise StageError.of(
            what="no *.safetensors in the model folder",
            where=str(folder),
            why="weights are read from safetensors only; a pickle (*.bin, *.pt) can run code when it is opened",
            next="convert it once where you trust it: model.save_pretrained(folder) writes safetensors",
        )


def _load(folder: Path, *, device: str, whole: bool = False, **extra: Any) -> PreTrainedModel:
    """from_pretrained with what holds for every arm; `extra` are more of its arguments.

    Args:
        folder: Model folder.
        device: `cpu` or `cuda`.
        whole: Refuse missing weights, as is always done of a quantized checkpoint.
        extra: More arguments of from_pretrained.

    Raises:
        StageError: No safetensors in the folder, no class that makes text, or weights that are missing there.
    """
    _refuse_pickles(folder)
    gpu = int(os.environ.get("LOCAL_RANK", "0"))  # of the lease's, where several processes train together
    place = {"": gpu if device == "cuda" else device}
    settings = {"device_map": place, "dtype": torch.bfloat16, "trust_remote_code": False, **extra}
    loaded: Any = read_class(folder, trusted=settings["trust_remote_code"]).from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **settings,
    )
    model, info = loaded
    if whole or getattr(model, "is_quantized", False):
        _refuse_missing(sorted(info["missing_keys"]), folder)
    if not settings["trust_remote_code"]:  # a class of its own may have no embeddings that it can name
        name_backbone(model)
    if getattr(model, "is_loaded_in_4bit", False):
        for layer in linear4bit(model).values():
            layer.support_avx512bf16_for_cpu = False
    return model.eval()
