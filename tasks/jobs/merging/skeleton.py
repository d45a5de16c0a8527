"""A base without its weights: its parameters, which tensor of the checkpoint each is, and which modules were 4-bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from recipes.models import headers
from recipes.models.decoder import is_expert
from tasks.jobs.loading.adapter_names import ModuleNames
from tasks.jobs.loading.classes import empty_model, linears, modules_to_skip
from tasks.jobs.loading.load import linear4bit
from tasks.jobs.loading.names import stored_parameters


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """What transformers makes of a checkpoint.

    Attributes:
        shapes: Every parameter's shape in the model; tied ones stand for themselves.
        stored: Parameter -> the one tensor of the checkpoint that it is, unchanged but for its type.
        dtypes: Parameter -> its type when the base is loaded in bf16 (a few architectures keep some in fp32).
        converted: transformers puts some parameters together from several tensors, or takes one apart.
        four_bit: Modules that QLoRA's loading turns into NF4.
        transposed: Modules whose weight is stored [in, out] (Conv1D).
        tied: Parameter -> the parameter that it shares by config.json; the checkpoint may hold one of them or both.
        embeddings: Module names of the input embeddings and of the output layer ("" where there is none).
        parts: Tensor of the checkpoint -> the parameter that is put together from it and others, or a part of it.
        linears: Linear layers.
        one_by_one: Matrices of the checkpoint that transformers stacks (experts): linear layers in its version 4, and
            parameters here, so that an adapter of that version changes them where they lie.
        names: What an adapter's names of modules are here.
    """

    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, str]
    dtypes: dict[str, torch.dtype]
    converted: bool
    four_bit: frozenset[str]
    transposed: frozenset[str]
    tied: dict[str, str]
    embeddings: tuple[str, str]
    parts: dict[str, str]
    linears: frozenset[str]
    one_by_one: frozenset[str]
    names: ModuleNames


def read_skeleton(folder: Path, tensors: Mapping[str, headers.Tensor]) -> Skeleton:
    """Build the model of config.json on the meta device and name its parameters' tensors by transformers' own rules.

    Args:
        folder: Model folder.
        tensors: Its checkpoint's, by name.
    """
    model = empty_model(folder)
    meta = model.state_dict()
    stored, parts = stored_parameters(model, tensors)
    shapes = {name: tuple(parameter.shape) for name, parameter in meta.items()}
    dtypes = _dtypes(model, shapes)
    experts = [name for name in parts if is_expert(name) and name.endswith(".weight") and name not in meta]
    matrices = [name for name in experts if len(tensors[name].shape) == 2]
    for name in matrices:
        shapes[name], stored[name], dtypes[name] = tensors[name].shape, name, dtypes[parts[name]]
    return Skeleton(
        shapes=shapes,
        stored=stored,
        dtypes=dtypes,
        converted=bool(parts),
        parts=parts,
        tied=dict(model.all_tied_weights_keys),
        transposed=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
        embeddings=(_name(model, model.get_input_embeddings()), _name(model, model.get_output_embeddings())),
        linears=frozenset(linears(model)),
        one_by_one=frozenset(name.removesuffix(".weight") for name in matrices),
        names=ModuleNames(model, also=[name.removesuffix(".weight") for name in matrices]),
        four_bit=_four_bit(model),  # last: it replaces modules
    )


def _name(model: nn.Module, searched: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is searched), "")


def _dtypes(model: PreTrainedModel, shapes: Iterable[str]) -> dict[str, torch.dtype]:
    plan = model._get_dtype_plan(torch.bfloat16)
    if not plan:
        return dict.fromkeys(shapes, torch.bfloat16)
    pattern = build_glob_alternation(list(plan))[0]
    return {name: torch.float32 if pattern.search(name) else torch.bfloat16 for name in shapes}


def _four_bit(model: PreTrainedModel) -> frozenset[str]:
    """What transformers' bitsandbytes quantizer replaces where `load_nf4` has it load the base."""
    kept = list(model._keep_in_fp32_modules or ())
    skip = HfQuantizer.get_modules_to_not_convert(model, modules_to_skip(model), kept)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return frozenset(linear4bit(replace_with_bnb_linear(model, skip, settings)))
