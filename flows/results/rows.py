"""Scores of an arm, row by row: scores.parquet and kl.parquet as the jobs write them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flows.results.draws import Floats
from flows.results.stats import Sums


@dataclass(frozen=True, eq=False)
class RowScores:
    """One metric of one arm on one split, one row per row, sorted by row.

    Attributes:
        rows: [rows] names; a name that appears twice makes the arms incomparable.
        group: [rows] name of each row's group.
        domain: [rows].
        total: [rows] sum of scores.
        count: [rows] tokens (1 for task).
        device: Kind of device that they were computed on; empty where nobody says.
    """

    rows: NDArray[np.str_]
    group: NDArray[np.str_]
    domain: NDArray[np.str_]
    total: Floats
    count: Floats
    device: str = ""

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted."""
        return tuple(str(name) for name in np.unique(self.group))

    @cached_property
    def sums(self) -> Sums:
        """Summed within groups, in the order of `groups`."""
        index = np.searchsorted(np.asarray(self.groups), self.group)
        size = len(self.groups)
        total, count = (np.bincount(index, weights, size).astype(np.float64) for weights in (self.total, self.count))
        return Sums(total, count)

    @property
    def finite(self) -> bool:
        """No NaN and no infinity anywhere."""
        return bool(np.isfinite(self.total).all())

    @property
    def binary(self) -> bool:
        """Every row scores 0 or 1."""
        return bool(np.isin(self.total, (0.0, 1.0)).all())

    @property
    def n(self) -> int:
        """Tokens, or rows where each counts once."""
        return int(self.count.sum())

    def same_rows(self, other: RowScores) -> bool:
        """Same rows, groups and tokens: what a paired comparison needs."""
        return (
            np.array_equal(self.rows, other.rows)
            and np.array_equal(self.group, other.group)
            and np.array_equal(self.count, other.count)
        )

    def same_device(self, other: RowScores) -> bool:
        """Computed on one kind of device, as far as both say."""
        return same_device(self.device, other.device)

    def of_domain(self, domain: str) -> RowScores:
        """Only the rows of a domain."""
        return self.where(self.domain == domain)

    def where(self, keep: NDArray[np.bool_]) -> RowScores:
        """Only some rows. keep: [rows]."""
        kept = (self.rows[keep], self.group[keep], self.domain[keep], self.total[keep], self.count[keep])
        return RowScores(*kept, device=self.device)

    def zeros(self) -> RowScores:
        """The same rows with a score of zero: the reference's KL to itself."""
        return replace(self, total=np.zeros_like(self.total))


CPU, CUDA = "cpu", "cuda"  # CUDA: of an artifact that is older than the kinds of devices


def same_device(a: str, b: str) -> bool:
    """Two kinds of devices are one, as far as both are known."""
    if not (a and b):
        return True
    return a == b or (CUDA in (a, b) and CPU not in (a, b))


_SPLIT = {"nll_general": "general"}  # every other metric is published on test


def read_scores(files: Path) -> dict[str, RowScores]:
    """Metric -> rows of scores.parquet of the split that is published; dev is for what chooses (read_dev)."""
    return _by_metric(pq.read_table(files / "scores.parquet").sort_by("row"), device=scored_on(files))


def read_dev(files: Path) -> dict[str, RowScores]:
    """Metric -> rows of dev, for what chooses and for tuning; rows of test are left out while reading."""
    table = pq.read_table(files / "scores.parquet", filters=[("split", "==", "dev")]).sort_by("row")
    return _by_metric(table, "dev", device=scored_on(files))


def scored_on(files: Path) -> str:
    """Kind of device that an evaluate step's scores were computed on, by its manifest; empty where it does not say.

    An engine that served an arm is compared with the arm's own figures whatever either ran on.
    """
    path = files.parent / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if manifest.get("stage") != "evaluate":
        return ""
    return manifest["result"].get("computed", {}).get("device") or manifest.get("execution", {}).get("device", "")


def _by_metric(table: pa.Table, wanted: str = "test", *, device: str) -> dict[str, RowScores]:
    row, group, domain, metric, split = (_names(table, name) for name in ("row", "group", "domain", "metric", "split"))
    total, count = _numbers(table, "sum"), _numbers(table, "n")
    scores: dict[str, RowScores] = {}
    for name in np.unique(metric):
        keep = (metric == name) & (split == _SPLIT.get(str(name), wanted))
        if keep.any():
            kept = (row[keep], group[keep], domain[keep], total[keep], count[keep])
            scores[str(name)] = RowScores(*kept, device=device)
    return scores


def _names(table: pa.Table, column: str) -> NDArray[np.str_]:
    return np.asarray(table[column].to_pylist(), dtype=np.str_)


def _numbers(table: pa.Table, column: str) -> Floats:
    return np.asarray(table[column].to_numpy(), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class TokenKL:
    """KL of every completion token of test.

    Attributes:
        kl: [tokens] nats.
        group: [tokens] index into the sorted groups.
    """

    kl: Floats
    group: NDArray[np.int64]
    groups: tuple[str, ...]


def read_kl(files: Path) -> TokenKL | None:
    """kl.parquet, test only; None where it has no such row."""
    path = files / "kl.parquet"
    if not path.exists():
        return None
    table = pq.read_table(path, columns=["group", "kl"], filters=[("split", "==", "test")])
    if not table.num_rows:
        return None
    groups, index = np.unique(_names(table, "group"), return_inverse=True)
    return TokenKL(_numbers(table, "kl"), index.astype(np.int64), tuple(str(name) for name in groups))
