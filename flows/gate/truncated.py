"""How many of the candidate's answers have no end: they score 0, so too short a limit looks like a bad model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.results.rows import RowScores

TRUNCATED = "truncated"


def truncated_of(scores: Mapping[str, RowScores]) -> dict[str, Any] | None:
    """What report.json says under `gate.truncated`; None where every answer has an end, or none was counted."""
    rows = scores.get(TRUNCATED)
    if rows is None or not (count := int(rows.total.sum())):
        return None
    share = count / rows.n
    text = (
        f"{count:,} of its {rows.n:,} answers on test ({100 * share:.1f} %) have no end and score 0: cut off at "
        "evaluate.max_new_tokens, or thinking that never ends."
    )
    return {"answers": count, "n": rows.n, "share": share, "text": text}
