"""Arms and evidence without a run behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flows.results.cells import ArmEvidence
from flows.results.read import RunArm
from flows.results.rows import RowScores


def arm(slug: str, **changes: Any) -> RunArm:
    """An arm of this name; everything else as for the untouched base."""
    plain: dict[str, Any] = {"kind": "bf16", "merge_base": None, "scheme": None, "quantization": None, "on_base": False}
    plain |= {"model": None, "adapter": None, "evaluate": f"evaluate/{slug}", "measure": None}
    return RunArm(slug=slug, **{**plain, **changes})


def evidence(arms: Iterable[RunArm], scores: Mapping[str, Mapping[str, RowScores]]) -> dict[str, ArmEvidence]:
    """An arm without scores is one whose evaluation failed."""
    return {
        one.slug: ArmEvidence(
            arm=one,
            failure=None if one.slug in scores else f"evaluate/{one.slug}: planted",
            scores=scores.get(one.slug, {}),
            kl=None,
        )
        for one in arms
    }
