"""Rotary embeddings in both spellings of config.json.

transformers 5 writes `rope_parameters`; transformers 4, with which older engines and the archived packages read, knows
`rope_theta` and `rope_scaling` alone and takes 10,000 where they are missing, without a word (tried with 4.44.2; 5.23.0
reads a file that has both).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def older_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to a config.json for transformers 4; nothing where it is there, or rope differs by kind of layer."""
    rope = config.get("rope_parameters")
    if not rope or "rope_theta" not in rope or "rope_theta" in config:
        return {}
    more = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return older if more.get("rope_type", "default") == "default" else older | {"rope_scaling": more}
