"""A linear layer by name and shape: what headers list and schemes quantize."""

from __future__ import annotations

import re
from typing import NamedTuple


class Linear(NamedTuple):
    """A linear layer that a scheme quantizes: the weight's name without `.weight`, and its shape."""

    name: str
    in_features: int
    out_features: int

    @property
    def family(self) -> str:
        """The name with layer numbers as `*`: one for all layers of a kind."""
        return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", self.name)
