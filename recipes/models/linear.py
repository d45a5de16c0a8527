"""A linear layer by name and shape: what headers list and schemes quantize."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Linear(NamedTuple):
    """A linear layer that a scheme quantizes: the weight's name without `.weight`, and its shape."""

    name: str
    in_features: int
    out_features: int

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.in_features * self.out_features

    @property
    def family(self) -> str:
        """The name with layer numbers as `*`: one for all layers of a kind."""
        return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", self.name)


def weight_count(layers: Iterable[Linear]) -> int:
    """Weights of these layers, summed."""
    return sum(layer.weights for layer in layers)
