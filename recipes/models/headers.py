"""What a model folder tells before any weight is read: config.json, safetensors headers, tokenizer files.

Standard library only, so that a 70B base is checked in milliseconds. Where config.json leaves numbers to defaults of
transformers' classes, a child process is asked once (recipes/models/defaults.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes.models.chat_template import FolderTemplate, read_template
from recipes.models.decoder import find_decoder, is_expert, layer_number, sizes_of
from recipes.models.defaults import SPELLINGS, complete
from recipes.models.kv_cache import Attention, CacheLayer, cache_layers
from recipes.models.linear import Linear, weight_count
from recipes.models.refusals import config_problems, encoder_decoder, has_tokenizer, no_config, no_tokenizer
from recipes.models.weights import Tensor, read_tensors
from recipes.plain import json_object, number_of
from recipes.problem import Problem, RecipeError

__all__ = ["Headers", "Tensor", "read_headers"]

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tok_embeddings")


@dataclass(frozen=True, kw_only=True)
class Headers:
    """A causal language model as its folder describes it.

    Attributes:
        folder: The model folder.
        config: config.json.
        text_config: Its text part, with transformers' defaults where it leaves a number out.
        tensors: Every tensor, by name.
        linears: What a scheme quantizes: the text decoder's linear layers, experts that are stored one by one among
            them, without routers. Names as in the checkpoint.
        stacked_experts: The text decoder's experts that are stored as one weight a layer.
        towers: Everything outside the text decoder, its embeddings and its output layer: vision, audio, projectors.
        dropped: Layers that transformers does not load: heads that predict several tokens.
        template: The chat template that the folder brings.
    """

    folder: Path
    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    linears: tuple[Linear, ...]
    stacked_experts: tuple[Tensor, ...] = ()
    towers: tuple[Tensor, ...] = ()
    dropped: tuple[Tensor, ...] = ()
    template: FolderTemplate = field(default_factory=FolderTemplate)

    @property
    def has_chat_template(self) -> bool:
        """The base brings a chat template."""
        return bool(self.template.texts)

    @cached_property
    def parameters(self) -> int:
        """Stored parameters, towers too; tied ones count once."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @cached_property
    def loaded_parameters(self) -> int:
        """Stored parameters, less those that transformers does not load."""
        return self.parameters - sum(tensor.numel for tensor in self.dropped)

    @property
    def tower_parameters(self) -> int:
        """Parameters outside the text decoder, its embeddings and its output layer."""
        return sum(tensor.numel for tensor in self.towers)

    @cached_property
    def linear_parameters(self) -> int:
        """Parameters of the linear layers that a scheme quantizes."""
        return weight_count(self.linears)

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of the experts of a mixture, stored one by one or as one weight: training leaves them bf16."""
        apart = weight_count(layer for layer in self.linears if is_expert(layer.name))
        return apart + sum(tensor.numel for tensor in self.stacked_experts)

    @cached_property
    def dense_linears(self) -> tuple[Linear, ...]:
        """The linear layers that are no experts: what training quantizes and adapts."""
        return tuple(layer for layer in self.linears if not is_expert(layer.name))

    @cached_property
    def dense_linear_parameters(self) -> int:
        """Parameters of the linear layers that are no experts."""
        return weight_count(self.dense_linears)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embeddings and, where it is untied, the output layer."""
        return sum(tensor.numel for tensor in self.embeddings)

    @cached_property
    def embeddings(self) -> tuple[Tensor, ...]:
        """The input embeddings and, where it is untied, the output layer."""
        others = {tensor.name for tensor in (*self.towers, *self.dropped)}
        outside = (
            tensor
            for name, tensor in self.tensors.items()
            if len(tensor.shape) == 2 and name not in others and layer_number(name) is None
        )
        sizes = {self.vocabulary, self.hidden}  # Gemma 4 has an embedding of its own for every layer, of other width
        return tuple(one for one in outside if sizes == {*one.shape} or _module(one.name).endswith(EMBEDDINGS))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @cached_property
    def tied(self) -> bool:
        """No output layer is stored: the input embeddings serve as it."""
        return not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in self.tensors)

    @property
    def vocabulary(self) -> int:
        """Entries of the vocabulary."""
        return self._known("vocab_size")

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self._known("hidden_size")

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self._known("num_hidden_layers")

    @property
    def max_positions(self) -> int | None:
        """Longest context the base was made for, in tokens; None where config.json names none."""
        return number_of(self.text_config, "max_position_embeddings", "n_positions", "n_ctx")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self._known("num_attention_heads")

    @property
    def kv_features(self) -> int:
        """Features of keys (or values) per token of the layer that has most: heads x head size."""
        return max((layer.keys for layer in self.cache_layers), default=0)

    @cached_property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """The layers that keep keys and values, or a state, with their sizes."""
        return cache_layers(self.text_config, Attention(self.layers, self.hidden, self.heads))

    def cache_numbers(self, tokens: int) -> int:
        """Numbers (keys, values, states) that one sequence of so many tokens keeps, over all layers."""
        return sum(layer.numbers(tokens) for layer in self.cache_layers)

    @cached_property
    def decoder_layer(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer, the one with most."""
        by_number: dict[str, list[Linear]] = {}
        for layer in self.linears:
            number = next(part for part in layer.name.split(".") if part.isdigit())
            by_number.setdefault(number, []).append(layer)
        return tuple(max(by_number.values(), key=weight_count))

    @property
    def largest_in_features(self) -> int:
        """Inputs of the widest layer that a scheme quantizes: the size of the largest Hessian."""
        return max(layer.in_features for layer in self.linears)

    def _known(self, name: str) -> int:
        """A number of the text config, under any of its spellings.

        Raises:
            RecipeError: It is not there: nothing is counted with a guess.
        """
        value = number_of(self.text_config, name, *SPELLINGS[name])
        if value is None:
            raise Problem(
                what=f"config.json says no {name} that can be counted with.",
                where=str(self.folder / "config.json"),
                why="Layers, memory and sizes cannot be counted without.",
                next="Write it into config.json as the release's card says.",
            ).error()
        return value


def read_headers(folder: Path, *, needs_tokenizer: bool = True) -> Headers:
    """Read a base model's folder.

    Args:
        folder: The model folder.
        needs_tokenizer: Refuse a folder without one; merging weights needs none.

    Raises:
        RecipeError: With every problem: no config.json, no safetensors or broken ones, no tokenizer, an adapter, an
            already quantized model or one that makes no text instead of a base, layers that are not as config.json
            says.
    """
    config = json_object(folder / "config.json")
    problems: list[Problem] = [no_config(folder)] if config is None else list(config_problems(folder, config))
    tensors: dict[str, Tensor] = {}
    try:
        tensors = read_tensors(folder)
    except RecipeError as error:
        problems += error.problems
    if needs_tokenizer and not has_tokenizer(folder):
        problems.append(no_tokenizer(folder))
    if problems or config is None:  # a quantized or truncated checkpoint has other layers: one cause, one problem
        raise RecipeError(problems)
    text = complete(folder, config, key_features=_key_features(tensors))
    if isinstance(text, Problem):
        raise text.error()
    if text.get("is_encoder_decoder") and not config.get("is_encoder_decoder"):
        raise encoder_decoder(folder).error()
    return _headers(folder, config, text, tensors)


def _headers(
    folder: Path, config: Mapping[str, Any], text: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Headers:
    whole = Headers(
        folder=folder, config=config, text_config=text, tensors=tensors, linears=(), template=read_template(folder)
    )
    sizes = sizes_of(config, text, hidden=whole.hidden, layers=whole.layers, vocabulary=whole.vocabulary)
    decoder = find_decoder(tensors, sizes, where=str(folder))
    if isinstance(decoder, Problem):
        raise decoder.error()
    return replace(
        whole,
        linears=decoder.linears,
        stacked_experts=decoder.stacked_experts,
        towers=decoder.towers,
        dropped=decoder.dropped,
    )


def _key_features(tensors: Mapping[str, Tensor]) -> int | None:
    """Outputs of the layers called k_proj outside towers, where all have as many."""
    outputs = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".self_attn.k_proj.weight")}
    return outputs.pop() if len(outputs) == 1 else None


def _module(name: str) -> str:
    return name.removesuffix(".weight")
