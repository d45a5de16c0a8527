"""Which tensors of a checkpoint are the text decoder, which are towers, and which nobody loads.

A vision-language checkpoint holds several stacks of numbered layers. The text decoder is the one that has as many
layers as the text config says and weights of its width; names decide only where that leaves more than one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.models.linear import Linear
from recipes.models.weights import Tensor
from recipes.problem import Problem

TRANSPOSED = ("gpt2", "openai-gpt")  # Conv1D: weights are [in, out]
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_TOWER = re.compile(  # parts that make something else than text of tokens
    r"(^|[._])(vision|visual|vit|vpm|image|images|img|video|audio|speech|sound|apm|encoder|projector|connector|aligner"
    r"|resampler|perceiver|qformer|merger|talker|code2wav|token2wav)([._]|$)"
)
_TEXT = re.compile(r"(^|[._])(language|text|llm|decoder)([._]|$)")
_PREDICTION = re.compile(r"(^|\.)(mtp|nextn)")  # heads that predict several tokens: no class of transformers loads them
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")  # routers of mixtures of experts stay unquantized
_NORM = re.compile(r"norm\d*$")  # Cohere's q_norm has a row per head
_EXPERT = re.compile(r"(^|\.)experts\.")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out)\.")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The text decoder of a checkpoint.

    Attributes:
        stack: What the names of its layers begin with: `model.language_model.layers.`.
        linears: Its linear layers, without routers.
        stacked_experts: Its experts that are stored as one weight a layer.
        towers: Everything that is neither in the decoder nor its embeddings nor its output layer.
        dropped: Layers behind the last one, and heads that predict several tokens: transformers does not load them.
    """

    stack: str
    linears: tuple[Linear, ...]
    stacked_experts: tuple[Tensor, ...]
    towers: tuple[Tensor, ...]
    dropped: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the text config says of the decoder.

    Attributes:
        layers: How many; more than one number where a config counts in two ways (LongCat's layers are double).
        hidden: Width of the residual stream.
        vocabulary: Entries of the vocabulary.
        experts: Experts a layer; 0 where it is no mixture.
        transposed: Weights are [in, out].
        composite: The model has other parts, too: config.json has a `text_config`.
    """

    layers: tuple[int, ...]
    hidden: int
    vocabulary: int
    experts: int
    transposed: bool
    composite: bool


def sizes_of(config: Mapping[str, Any], text: Mapping[str, Any], *, hidden: int, layers: int, vocabulary: int) -> Sizes:
    """From config.json and its text part."""
    counts = (value for name in EXPERT_COUNTS if isinstance(value := text.get(name), int))
    double = text.get("num_layers")
    return Sizes(
        layers=(layers, *([double] if isinstance(double, int) and double != layers else [])),
        hidden=hidden,
        vocabulary=vocabulary,
        experts=max(counts, default=0),
        transposed=text.get("model_type") in TRANSPOSED,
        composite=text is not config and "text_config" in config,
    )


def find_decoder(tensors: Mapping[str, Tensor], sizes: Sizes, *, where: str) -> Decoder | Problem:
    """Divide a checkpoint into its parts; a problem where no stack of layers, or more than one, fits the config."""
    stacks = _stacks(tensors.values())
    fitting = [stack for stack in stacks if _fits(stacks[stack], sizes)]
    for narrower in (
        [stack for stack in fitting if not is_tower(stack) and not _PREDICTION.search(stack)],
        [stack for stack in fitting if _TEXT.search(stack) and not is_tower(stack)],
    ):
        fitting = narrower if len(fitting) > 1 and narrower else fitting
    if len(fitting) != 1:
        return _misfit(stacks, fitting, sizes, where=where)
    return _divide(tensors, fitting[0], stacks[fitting[0]], sizes)


def is_tower(name: str) -> bool:
    """The name is that of a part for images, sound or what joins them to the text."""
    return _TOWER.search(name) is not None


def is_expert(name: str) -> bool:
    """The layer of this name is an expert of a mixture."""
    return _EXPERT.search(name) is not None


def is_router(module: str) -> bool:
    """The module of this name chooses experts, or weighs the shared one: it stays as it is."""
    return _ROUTER.search(module) is not None


def layer_number(name: str) -> tuple[str, int] | None:
    """("model.layers.", 3) of `model.layers.3.mlp.experts.0.w1.weight`; None outside numbered layers."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return "".join(f"{before}." for before in parts[:place]), int(part)
    return None


def _stacks(tensors: Iterable[Tensor]) -> dict[str, dict[int, list[Tensor]]]:
    """Prefix -> layer number -> its tensors."""
    stacks: dict[str, dict[int, list[Tensor]]] = {}
    for tensor in tensors:
        if place := layer_number(tensor.name):
            stacks.setdefault(place[0], {}).setdefault(place[1], []).append(tensor)
    return stacks


def _fits(layers: Mapping[int, list[Tensor]], sizes: Sizes) -> bool:
    """Every layer that the config counts is there, and some weight is as wide as the model."""
    if not any(all(number in layers for number in range(count)) for count in sizes.layers):
        return False
    return any(len(tensor.shape) == 2 and sizes.hidden in tensor.shape for part in layers.values() for tensor in part)


def _divide(tensors: Mapping[str, Tensor], stack: str, layers: Mapping[int, list[Tensor]], sizes: Sizes) -> Decoder:
    count = next(count for count in sizes.layers if all(number in layers for number in range(count)))
    inside = [tensor for number in range(count) for tensor in layers[number]]
    names = {tensor.name for tensor in inside}
    extra = {tensor.name for number, part in layers.items() if number >= count for tensor in part}
    towers: list[Tensor] = []
    dropped: list[Tensor] = []
    for name, tensor in tensors.items():
        if name in extra or (name not in names and _PREDICTION.search(name)):
            dropped.append(tensor)
        elif name not in names and _is_outside(tensor, stack, sizes):
            towers.append(tensor)
    ordered = [tensor for name, tensor in tensors.items() if name in names]
    return Decoder(
        stack=stack,
        linears=tuple(_linears(ordered, transposed=sizes.transposed)),
        stacked_experts=tuple(tensor for tensor in ordered if _is_stacked(tensor, sizes.experts)),
        towers=tuple(towers),
        dropped=tuple(dropped),
    )


def _is_outside(tensor: Tensor, stack: str, sizes: Sizes) -> bool:
    """A tensor outside the decoder's layers is none of its embeddings, norms or output layer."""
    root = stack.rstrip(".").rpartition(".")[0]
    name = tensor.name.removeprefix(f"{root}.") if root else tensor.name
    if is_tower(name):
        return True
    inside = not root or name != tensor.name
    words = _OUTPUT.search(name) is not None or (sizes.vocabulary in tensor.shape and sizes.hidden in tensor.shape)
    return sizes.composite and not inside and not words


def _linears(tensors: Iterable[Tensor], *, transposed: bool) -> Iterator[Linear]:
    """2-D weights, in the order of the checkpoint."""
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        if len(tensor.shape) != 2 or module == tensor.name or is_router(module) or _NORM.search(module):
            continue
        rows, columns = tensor.shape
        yield Linear(module, *((rows, columns) if transposed else (columns, rows)))


def _is_stacked(tensor: Tensor, experts: int) -> bool:
    """All experts of a layer in one weight: [experts, ...], whatever it is called (Granite: `input_linear`)."""
    if is_expert(tensor.name):
        return len(tensor.shape) == 3 or (len(tensor.shape) == 2 and not tensor.name.endswith((".weight", "bias")))
    return len(tensor.shape) == 3 and tensor.shape[0] == experts and min(tensor.shape) > 1


def _misfit(
    stacks: Mapping[str, Mapping[int, list[Tensor]]], fitting: list[str], sizes: Sizes, *, where: str
) -> Problem:
    counted = " or ".join(map(str, sizes.layers))
    shown = ", ".join(f"{stack}* ({len(stacks[stack])} layers)" for stack in fitting or stacks) or "none"
    if fitting:
        return Problem(
            what=f"Several parts of the checkpoint could be its text decoder: {shown}.",
            where=where,
            why=f"config.json says {counted} layers of width {sizes.hidden}; all of them are so, and their names do "
            "not tell which makes text.",
            next="Name a base whose parts transformers calls language_model or text_model, or its text-only release.",
        )
    return Problem(
        what="The base has no linear layers inside repeated decoder layers as config.json counts them.",
        where=where,
        why=f"config.json says {counted} layers of width {sizes.hidden}; the checkpoint's layers are: {shown}. Those "
        "are what an adapter trains and a scheme quantizes, and transformers would fill absent ones with random "
        "numbers.",
        next="Name a causal language model of a Llama-like, Qwen, Mistral, Gemma, Phi or GPT-2 architecture, or "
        "download config.json and the weights of one revision again.",
    )
