"""Bytes of a model's weights on each card, where vLLM splits them over several: arithmetic that no GPU has confirmed.

Read from the source of vLLM 0.32.0. Linear layers are split, by outputs or by inputs, and what Marlin pads is padded;
key-value heads are repeated where there are fewer of them than ranks; the embeddings and the output layer are padded
and split by entries. Norms, routers, biases, an adapter and everything outside the text decoder are whole on each card
(vLLM splits some towers: then it is less).
"""

from __future__ import annotations

from recipes.models.headers import Headers
from recipes.models.linear import Linear
from recipes.schemes.engines import padded
from recipes.schemes.limits import quantized_linears
from recipes.schemes.ranks import Part, ServedModel, padded_vocabulary, parts
from recipes.schemes.scheme import Scheme

MARLIN_BITS = (4, 8)  # others go to Humming, which was not read for padding
BF16_BYTES = 2


def rank_bytes(stored: float, scheme: Scheme | None, headers: Headers, *, ranks: int) -> float:
    """Bytes on one of `ranks` cards of a model whose files take `stored` bytes.

    Args:
        stored: Bytes of the files.
        scheme: How its linear layers are quantized; None for bf16.
        headers: Of the model in bf16.
        ranks: Cards, which divide its heads and layers.
    """
    if ranks == 1:
        return stored
    model = ServedModel.of(headers)
    return max(stored / ranks, stored - _saved(scheme, headers, model, ranks))


def _saved(scheme: Scheme | None, headers: Headers, model: ServedModel, ranks: int) -> float:
    """Bytes that a card does not hold of what is split."""
    quantized = {part.layer.name: part for part in parts(scheme, model, ranks)} if scheme else {}
    held = {layer.name for layer in quantized_linears(scheme, headers)} if scheme else set[str]()
    saved = 0.0
    for layer in headers.linears:
        part = quantized.get(layer.name)
        if scheme is None or part is None or layer.name not in held:
            saved += BF16_BYTES * (layer.weights - model.inputs(layer, ranks) * model.outputs(layer, ranks))
        else:
            saved += scheme.predicted_bytes([layer]) - _quantized(scheme, part)
    stacked = sum(tensor.numel for tensor in headers.stacked_experts)
    return saved + BF16_BYTES * (stacked * (1 - 1 / ranks) + _vocabulary(headers, ranks))


def _quantized(scheme: Scheme, part: Part) -> float:
    """Bytes of a quantized layer on one card: scales go with their groups; one scale per output is on every card."""
    size = scheme.predicted_bytes([Linear(part.layer.name, part.inputs, part.own)])
    if part.bits not in MARLIN_BITS:
        return size
    outputs, inputs = padded(part)
    return size * (outputs * inputs) / (part.outputs * part.inputs)


def _vocabulary(headers: Headers, ranks: int) -> float:
    """Parameters of embeddings and output layer that a card does not hold."""
    entries = headers.vocabulary
    share = padded_vocabulary(entries) / ranks / entries
    return sum(tensor.numel * (1 - share) for tensor in headers.embeddings if tensor.shape[0] == entries)
