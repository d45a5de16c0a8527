"""Lines of scores.parquet, one per row and metric, and their means."""

from __future__ import annotations

from collections.abc import Sequence
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


def means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric by split, as `metric/split`."""
    sums: dict[str, list[float]] = {}
    for line in lines:
        total_and_n = sums.setdefault(f"{line['metric']}/{line['split']}", [0.0, 0.0])
        total_and_n[0] += line["sum"]
        total_and_n[1] += line["n"]
    return {name: total / n for name, (total, n) in sums.items() if n}
