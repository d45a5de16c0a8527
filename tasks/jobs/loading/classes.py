"""Which class of transformers a folder is loaded as, and which of its linear layers are the text decoder's.

A model with towers (images, audio) is loaded whole, so that what is trained, merged, quantized and served has them,
unchanged. AutoModelForCausalLM in transformers 5.23 leaves the towers of some out (Qwen3.5, Llama 4), knows nothing of
others (Mistral3, SmolVLM, Qwen3-VL, Voxtral), and takes a few whole (Gemma 3 and 4).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recipes.models.decoder import is_router
from tasks.runtime.process.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What transformers 5 alone has is imported where it is used: the environment autogptq has 4.44, and imports this.
BACKBONE = "text_backbone"
_OWN_LAYERS = re.compile(r"^\w+\.\d+\.")  # of a decoder: layers.0.mlp, h.0.attn; not encoder.layers.0


def class_of(config: PreTrainedConfig, *, where: str) -> Any:
    """The Auto class that loads a configuration whole: the class that the checkpoint names.

    Args:
        config: Of a folder.
        where: The folder, for the error.

    Raises:
        StageError: transformers has no class for it that makes text.
    """
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    kind: Any = config.model_type  # the stub knows these tables by their own names alone
    whole: str | None = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind)
    text: str | None = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    named = (config.architectures or [whole])[0]
    if whole is not None and (named != text or whole == text):
        return AutoModelForMultimodalLM
    if text is not None:
        return AutoModelForCausalLM
    raise StageError.of(
        what=f"no class of transformers {transformers.__version__} makes text with a model of type {config.model_type}",
        where=where,
        why="a base is loaded by AutoModelForCausalLM, or by AutoModelForMultimodalLM where it has towers",
        next="name a causal language model, or a vision-language or audio model with a text decoder",
    )


def read_class(folder: Path, *, trusted: bool = False) -> Any:
    """The Auto class that loads a folder.

    Args:
        folder: Model folder.
        trusted: Code in the folder may run; it says itself what a causal language model is.

    Raises:
        StageError: transformers has no class for it that makes text.
    """
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trusted)
    if trusted and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    return class_of(config, where=str(folder))


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder on the meta device: names and shapes, no weights.

    Raises:
        StageError: transformers has no class for it that makes text.
    """
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    auto = class_of(config, where=str(folder))
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)


def text_decoder(model: PreTrainedModel) -> str:
    """Name of the text decoder: the innermost model of transformers that holds the input embeddings; "" for `model`."""
    embeddings = model.get_input_embeddings()
    holders = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(part is embeddings for part in module.modules())
    ]
    return max(holders, key=len, default="")


def text_linears(model: PreTrainedModel) -> frozenset[str]:
    """Full names of the linear layers inside the text decoder's repeated layers: what is quantized and adapted.

    Left out are towers, projectors, embeddings, the output layer, and routers of mixtures.
    """
    stem = text_decoder(model)
    prefix = f"{stem}." if stem else ""
    inside = {name.removeprefix(prefix): name for name in linears(model) if name.startswith(prefix)}
    own = {name for rest, name in inside.items() if _OWN_LAYERS.match(rest)}
    return frozenset(name for name in own if not is_router(name))


def outside_linears(model: PreTrainedModel) -> frozenset[str]:
    """Full names of the other linear layers: towers, projectors, routers; not the output layer."""
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    return frozenset(linears(model)) - text_linears(model) - {head_name}


def has_towers(model: PreTrainedModel) -> bool:
    """Linear layers lie outside the text decoder's layers: `all-linear` would take them for the decoder's."""
    return any(not is_router(name) for name in outside_linears(model))


def modules_to_skip(model: PreTrainedModel) -> list[str] | None:
    """Bitsandbytes' llm_int8_skip_modules: all but the text decoder's linear layers stay bf16.

    Args:
        model: Not quantized yet, as `empty_model` makes it.

    Returns:
        Module names as short as they can be (`model.vision_tower`), with the output layer. None where transformers'
        own choice is the same, so that the configuration of an ordinary text model stays the usual one.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    if not outside_linears(model):
        return None
    wanted = text_linears(model)
    parents = {parent for name in wanted for parent in _parents(name)}
    rest = set(linears(model)) - wanted
    names = {next(part for part in [*_parents(name), name] if part not in parents) for name in rest}
    for skip in (sorted(names), sorted(rest)):  # transformers takes them for regular expressions and ends of names
        if {name for name in linears(model) if should_convert_module(name, skip)} == wanted:
            return skip
    return sorted(rest)


def name_backbone(model: PreTrainedModel) -> None:
    """Let `base_model` be what gives last hidden states, where a wrapper (Llama 4) has no module between.

    TRL's fused output layer runs `base_model`, which transformers makes the wrapper itself then. An attribute that is
    no registered module: names of weights stay as they are.
    """
    if model.base_model is model and (stem := text_decoder(model)):
        object.__setattr__(model, BACKBONE, model.get_submodule(stem))
        model.base_model_prefix = BACKBONE


def linears(model: nn.Module) -> list[str]:
    """Full names of all linear layers, those that store their weight [in, out] (Conv1D) among them."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _parents(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
