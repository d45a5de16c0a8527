"""How much NF4 changes a weight against how much the adapter changes it: shown beside the choice of a merge base."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def error_over_delta(original: Tensor, dequantized: Tensor, delta: Tensor) -> float:
    """||original - dequantized|| / ||delta||, Frobenius norms in fp32; infinity where the adapter changes nothing.

    Above 1 the rounding of the base is the larger of the two changes, and it matters which base is merged into.

    Args:
        original: [out, in] weight as the base stores it.
        dequantized: [out, in] the same weight through NF4.
        delta: [out, in] scale * B @ A.
    """
    error = torch.linalg.vector_norm(original.float() - dequantized.float()).item()
    change = torch.linalg.vector_norm(delta.float()).item()
    return error / change if change else math.inf


def summary(ratios: Mapping[str, float]) -> dict[str, Any] | None:
    """Median and largest ratio over modules and by kind (last part of the name); untouched modules are only counted.

    Args:
        ratios: error_over_delta by module name.

    Returns:
        What stands as `error_over_delta` in the result of the merge; None where the adapter changes no module.
    """
    finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    if not finite:
        return None
    kinds: dict[str, list[float]] = {}
    for name, ratio in finite.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(ratio)
    most = max(finite, key=finite.__getitem__)
    return {
        "modules": len(finite),
        "untouched": len(ratios) - len(finite),
        "median": statistics.median(finite.values()),
        "max": finite[most],
        "max_module": most,
        "by_kind": {
            kind: {"median": statistics.median(some), "max": max(some)} for kind, some in sorted(kinds.items())
        },
    }
