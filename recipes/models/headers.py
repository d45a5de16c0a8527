"""What a model folder tells before any weight is read: config.json, safetensors headers, tokenizer files.

Standard library only, so that a 70B base is checked in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.models.chat_template import FolderTemplate, read_template
from recipes.models.linear import Linear
from recipes.models.weights import Tensor, read_tensors
from recipes.plain import is_mapping, json_object
from recipes.problem import Problem, RecipeError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TRANSPOSED = ("gpt2", "openai-gpt")  # Conv1D: weights are [in, out]
_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?)(?P<number>\d+)\.(?P<rest>.+)\.weight$")
_ROUTER = re.compile(r"(^|\.)(gate|router)$")  # routers of mixtures of experts stay unquantized
_EXPERT = re.compile(r"\.experts\.")


@dataclass(frozen=True, kw_only=True)
class Headers:
    """A causal language model as its folder describes it.

    Attributes:
        folder: The model folder.
        config: config.json.
        text_config: Its text part, for a model with several.
        tensors: Every tensor, by name.
        linears: What a scheme quantizes: 2-D weights inside the repeated layers, but for routers.
        template: The chat template that the folder brings.
    """

    folder: Path
    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    linears: tuple[Linear, ...]
    template: FolderTemplate = field(default_factory=FolderTemplate)

    @property
    def has_chat_template(self) -> bool:
        """The base brings a chat template."""
        return bool(self.template.texts)

    @property
    def parameters(self) -> int:
        """Stored parameters; tied ones count once."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def linear_parameters(self) -> int:
        """Parameters that a scheme quantizes."""
        return _parameters(self.linears)

    @property
    def expert_parameters(self) -> int:
        """Parameters of the experts of a mixture, stored one by one or as 3-D tensors: training leaves them bf16."""
        return sum(tensor.numel for name, tensor in self.tensors.items() if is_expert(name))

    @property
    def dense_linears(self) -> tuple[Linear, ...]:
        """The linear layers that are no experts: what training quantizes and adapts."""
        return tuple(layer for layer in self.linears if not is_expert(layer.name))

    @property
    def dense_linear_parameters(self) -> int:
        """Parameters of the linear layers that are no experts."""
        return _parameters(self.dense_linears)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embeddings and, where it is untied, the output layer."""
        return sum(
            tensor.numel
            for name, tensor in self.tensors.items()
            if len(tensor.shape) == 2 and self.vocabulary in tensor.shape and not _LAYER.match(name)
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def tied(self) -> bool:
        """No output layer is stored: the input embeddings serve as it."""
        return not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in self.tensors)

    @property
    def vocabulary(self) -> int:
        """Entries of the vocabulary."""
        return self._number("vocab_size") or 0

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self._number("hidden_size", "n_embd", "d_model") or 0

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self._number("num_hidden_layers", "n_layer", "num_layers") or 0

    @property
    def max_positions(self) -> int | None:
        """Longest context the base was made for, in tokens; None where config.json names none."""
        return self._number("max_position_embeddings", "n_positions", "n_ctx")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self._number("num_attention_heads", "n_head") or 1

    @property
    def kv_features(self) -> int:
        """Features of keys (or values) per token and layer: heads x head size."""
        size = self._number("head_dim") or self.hidden // self.heads
        return size * (self._number("num_key_value_heads") or self.heads)

    @property
    def decoder_layer(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer, the one with most."""
        by_number: dict[str, list[Linear]] = {}
        for layer in self.linears:
            number = next(part for part in layer.name.split(".") if part.isdigit())
            by_number.setdefault(number, []).append(layer)
        return tuple(max(by_number.values(), key=_parameters))

    @property
    def largest_in_features(self) -> int:
        """Inputs of the widest layer that a scheme quantizes: the size of the largest Hessian."""
        return max(layer.in_features for layer in self.linears)

    def _number(self, *names: str) -> int | None:
        for name in names:
            value = self.text_config.get(name)
            if isinstance(value, int):
                return value
        return None


def is_expert(name: str) -> bool:
    """The layer of this name is an expert of a mixture."""
    return _EXPERT.search(name) is not None


def _parameters(layers: Iterable[Linear]) -> int:
    return sum(layer.in_features * layer.out_features for layer in layers)


def read_headers(folder: Path) -> Headers:
    """Read a base model's folder.

    Raises:
        RecipeError: With every problem: no config.json, no safetensors or broken ones, no tokenizer, an adapter or an
            already quantized model instead of a base.
    """
    config = json_object(folder / "config.json")
    problems: list[Problem] = []
    tensors: dict[str, Tensor] = {}
    if config is None:
        problems.append(no_config(folder))
    elif "quantization_config" in config:
        problems.append(_quantized_already(folder))
    try:
        tensors = read_tensors(folder)
    except RecipeError as error:
        problems += error.problems
    if not has_tokenizer(folder):
        problems.append(no_tokenizer(folder))
    config = config or {}
    text_config = text_part(config)
    linears = tuple(_linears(tensors, transposed=text_config.get("model_type") in TRANSPOSED))
    if tensors and config and not linears:
        problems.append(_no_layers(folder))
    if problems:
        raise RecipeError(problems)
    return Headers(
        folder=folder,
        config=config,
        text_config=text_config,
        tensors=tensors,
        linears=linears,
        template=read_template(folder),
    )


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model; all of it where there is no other part."""
    text_config = config.get("text_config")
    return text_config if is_mapping(text_config) else config


def has_tokenizer(folder: Path) -> bool:
    """True where the folder holds a tokenizer's file."""
    return any((folder / name).exists() for name in TOKENIZERS)


def _linears(tensors: Mapping[str, Tensor], *, transposed: bool) -> Iterator[Linear]:
    """2-D weights inside numbered layers, in the order of the checkpoint."""
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        if match is None or len(tensor.shape) != 2 or _ROUTER.search(match["rest"]):
            continue
        rows, columns = tensor.shape
        yield Linear(name.removesuffix(".weight"), *((rows, columns) if transposed else (columns, rows)))


# ---- what is wrong with a folder


def no_config(folder: Path) -> Problem:
    """Its config.json is absent or unreadable; an adapter has none."""
    path = folder / "config.json"
    adapter = (folder / "adapter_config.json").exists()
    return Problem(
        what="config.json is not readable JSON." if path.exists() else "The base has no config.json.",
        where=str(path if path.exists() else folder),
        why="It is an adapter, not a base model." if adapter else "It names the architecture and its sizes.",
        next="Name the base that the adapter was trained on."
        if adapter
        else "Name a model folder as transformers' save_pretrained writes it.",
    )


def _quantized_already(folder: Path) -> Problem:
    return Problem(
        what="The base is quantized already.",
        where=f"{folder / 'config.json'} quantization_config",
        why="Training quantizes the original weights to NF4, and merging needs them too.",
        next="Name the original bf16, fp16 or fp32 model.",
    )


def _no_layers(folder: Path) -> Problem:
    return Problem(
        what="The base has no linear layers inside repeated decoder layers.",
        where=str(folder),
        why="Those are what an adapter trains and a scheme quantizes.",
        next="Name a causal language model of a Llama-like, Qwen, Mistral, Gemma, Phi or GPT-2 architecture.",
    )


def no_tokenizer(folder: Path) -> Problem:
    """None of the files of a tokenizer is there."""
    return Problem(
        what="The base has no tokenizer.",
        where=str(folder),
        why=f"None of {', '.join(TOKENIZERS)} is there, so no row can become tokens.",
        next="Copy the tokenizer files of the base into its folder.",
    )
