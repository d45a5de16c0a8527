"""Names in a checkpoint and names in the loaded model, by transformers' own rules: they need not be the same.

Gemma 3 is stored as `language_model.model.layers.0 ...` and loaded as `model.language_model.layers.0 ...`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


class Stored(NamedTuple):
    """Which tensor of a checkpoint is which parameter.

    Attributes:
        tensors: Parameter -> the one tensor that it is, unchanged but for its type.
        parts: Tensor -> the parameter that is put together from it and others, or a part of it.
    """

    tensors: dict[str, str]
    parts: dict[str, str]


def stored_parameters(model: PreTrainedModel, tensors: Iterable[str]) -> Stored:
    """Name the tensor of each of the model's parameters.

    Args:
        model: The model, on any device, also the meta device.
        tensors: Names in its checkpoint.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    parameters, prefix = model.state_dict(), model.base_model_prefix
    stored, parts = {}, {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, source = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, source = rename_source_key(name, [], [], prefix, parameters)
        if renamed in parameters and source is None:
            stored[renamed] = name
        elif renamed in parameters:
            parts[name] = renamed
    return Stored(stored, parts)


def modules_of(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """Layer name in the checkpoint -> module name in the model, for those that are one module there.

    Args:
        model: The model, with its weights not quantized yet.
        layers: Names of layers in the checkpoint, without `.weight`.
    """
    stored = stored_parameters(model, [f"{name}.weight" for name in layers]).tensors
    return {tensor.removesuffix(".weight"): parameter.removesuffix(".weight") for parameter, tensor in stored.items()}
