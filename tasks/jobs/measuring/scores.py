"""Lines of scores.parquet: one per row and metric."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from tasks.jobs.measuring.teacher_forcing import TokenRow

SCORES = pa.schema(
    [(name, pa.string()) for name in ("row", "group", "split", "domain", "metric")]
    + [("sum", pa.float64()), ("n", pa.int64())]
)


def score_line(row: TokenRow, metric: str, value: float, n: int) -> dict[str, Any]:
    """A row's sum of a metric over n tokens, bytes or answers."""
    return {
        "row": row.row,
        "group": row.group,
        "split": row.split,
        "domain": row.domain,
        "metric": metric,
        "sum": value,
        "n": n,
    }
