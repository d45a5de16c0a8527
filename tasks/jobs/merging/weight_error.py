"""How much NF4 changes a weight against how much the adapter changes it: shown beside the choice of a merge base."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Norms:
    """Squared Frobenius norms by module, of what NF4 changed and of what the adapter changes, summed part by part.

    Parts of one module come from one thread; modules may come from several.
    """

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float]] = {}

    def add(self, module: str, *, original: Tensor, dequantized: Tensor, merged: Tensor) -> None:
        """Add rows of a module.

        Args:
            module: Its name.
            original: [n, in] rows as the base stores them.
            dequantized: [n, in] the same through NF4.
            merged: [n, in] fp32, those with the adapter's change, before they are rounded.
        """
        plain = dequantized.to(torch.float32, copy=True)
        error = torch.linalg.vector_norm(original.to(torch.float32, copy=True).sub_(plain)).item()
        change = torch.linalg.vector_norm(plain.sub_(merged)).item()
        before = self._squares.get(module, (0.0, 0.0))
        self._squares[module] = (before[0] + error**2, before[1] + change**2)

    @property
    def ratios(self) -> dict[str, float]:
        """||W - NF4(W)|| / ||delta|| by module; infinity where the adapter changes nothing.

        Above 1 the rounding of the base is the larger of the two changes, and the choice of the merge base matters.
        """
        return {
            name: math.sqrt(error / change) if change else math.inf for name, (error, change) in self._squares.items()
        }


def summary(ratios: Mapping[str, float]) -> dict[str, Any] | None:
    """Median and largest ratio over modules and by kind (last part of the name); untouched modules are only counted.

    Args:
        ratios: Norms.ratios.

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
            kind: {"median": statistics.median(values), "max": max(values)} for kind, values in sorted(kinds.items())
        },
    }
