"""What one token meets of a mixture of experts: the router sends it to a few of them."""

from __future__ import annotations

from collections.abc import Iterable

from recipes.models.decoder import EXPERT_COUNTS, is_expert
from recipes.models.headers import Headers
from recipes.models.linear import Linear
from recipes.plain import number_of

# Keys of a text_config.
ROUTED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "top_k_experts",
    "moe_topk",
    "moe_k",
)


def routed_share(headers: Headers) -> float:
    """Share of a mixture's experts that a token is routed to; all of them where config.json does not say."""
    count, routed = (number_of(headers.text_config, *names) for names in (EXPERT_COUNTS, ROUTED))
    return min(1.0, routed / count) if count and routed else 1.0


def met_features(headers: Headers, layers: Iterable[Linear]) -> float:
    """Inputs and outputs of the linear layers that a token meets, summed; stacked experts left out."""
    share = routed_share(headers)
    return sum((share if is_expert(layer.name) else 1.0) * (layer.in_features + layer.out_features) for layer in layers)


def met_stacked_features(headers: Headers) -> float:
    """The same of experts that are stacked, over all decoder layers."""
    sizes = [(tensor.shape[0], sum(tensor.shape[1:])) for tensor in headers.stacked_experts]
    return routed_share(headers) * sum(count * features for count, features in sizes)
