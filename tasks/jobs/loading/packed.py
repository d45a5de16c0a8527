"""GPTQ and AWQ checkpoints in transformers: the layers that the files hold packed become packed ones, and no others.

Left alone, transformers 5.23 takes every linear layer for packed that no list in config.json leaves out (AWQ), or every
one below the first name of a list of its own (GPTQ, by optimum: `model.language_model.layers` is in it, SmolVLM's and
Llama 4's are not): towers, routers, gates of shared experts. Their weights then are missing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_awq import AwqQuantizer

from recipes.models.weights import read_tensors
from recipes.problem import RecipeError
from tasks.jobs.loading.classes import text_decoder
from tasks.runtime.process.errors import StageError

PACKED = ".qweight"
_FROM_LAYER = re.compile(r"\w+\.\d+\..+$")  # layers.0.mlp.down_proj: what stands before differs in files and models


@contextlib.contextmanager
def packed_as_stored(folder: Path, method: str) -> Iterator[None]:
    """Models loaded meanwhile have packed layers where `folder` does.

    Args:
        folder: A quantized checkpoint.
        method: `gptq` or `awq`.

    Raises:
        StageError: Its index or a header is broken.
    """
    try:
        tensors = read_tensors(folder)
    except RecipeError as error:
        raise StageError(error.problems[0]) from error
    packed = {_from_layer(name.removesuffix(PACKED)) for name in tensors if name.endswith(PACKED)}
    with _gptq(packed) if method == "gptq" else _awq(packed):
        yield


def _from_layer(name: str) -> str:
    found = _FROM_LAYER.search(name)
    return found.group() if found else name


def _is_packed(model: PreTrainedModel, name: str, packed: set[str]) -> bool:
    return name.startswith(text_decoder(model)) and _from_layer(name) in packed


@contextlib.contextmanager
def _awq(packed: set[str]) -> Iterator[None]:
    usual: Any = AwqQuantizer.get_modules_to_not_convert

    def left_out(model: PreTrainedModel, *args: Any, **settings: Any) -> list[str]:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in linears if not _is_packed(model, name, packed)]

    AwqQuantizer.get_modules_to_not_convert = staticmethod(left_out)
    try:
        yield
    finally:
        AwqQuantizer.get_modules_to_not_convert = usual


@contextlib.contextmanager
def _gptq(packed: set[str]) -> Iterator[None]:
    from optimum.gptq import quantizer  # imports datasets: only where it is needed

    names, usual = quantizer.get_block_name_with_pattern, quantizer.get_layers

    def layers(module: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        if "prefix" not in settings:
            return usual(module, *args, **settings)
        linears = {name: part for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
        return {name: part for name, part in linears.items() if _is_packed(module, name, packed)}

    quantizer.get_block_name_with_pattern = text_decoder  # nothing but `layers` reads it while a checkpoint is loaded
    quantizer.get_layers = layers
    try:
        yield
    finally:
        quantizer.get_block_name_with_pattern, quantizer.get_layers = names, usual
