"""One weight in parts of rows: as the base has it or as NF4 makes it, with the adapter's change added in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.jobs.merging.deltas import Delta
from tasks.jobs.merging.nf4 import quantize, row_step, sample_positions
from tasks.jobs.merging.nf4_record import Records
from tasks.jobs.merging.plan import MergeItem
from tasks.jobs.merging.streams import Reader
from tasks.jobs.merging.weight_error import Norms
from tasks.runtime.process.errors import StageError

# Elements that are worked on at once: on a CPU 1 MiB in fp32, which stays in the cache (quantizing 4096 x 4096 takes
# 0.36 s in such parts and 0.49 s at once); a GPU wants more.
PART = {"cpu": 1 << 18, "cuda": 1 << 24}


class FourBitChecks(NamedTuple):
    """What is measured of the 4-bit modules while they are merged."""

    records: Records
    norms: Norms


class WeightRows:
    """A tensor as rows [out, in] of bf16 on the device, as loading the base gives it; a bias is rows of one."""

    def __init__(self, item: MergeItem, reader: Reader, device: str) -> None:
        shape = tuple(reversed(item.source.shape)) if item.transposed else item.source.shape
        self.rows, self.columns = shape[0], (shape[1] if len(shape) > 1 else 1)
        self.is_bias = len(shape) == 1
        self.device = device
        self._item, self._reader = item, reader
        self._whole = reader.whole(item.source).T.contiguous() if item.transposed else None
        step = row_step(self.columns)
        step *= max(1, PART[device] // (step * self.columns))
        self.spans = [(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]

    def read(self, first: int, last: int) -> Tensor:
        """Rows first to last (exclusive)."""
        if self._whole is not None:
            rows = self._whole[first:last]
        else:
            rows = self._reader.read(self._item.source, first * self.columns, last * self.columns)
            rows = rows.view(-1, self.columns)
        return rows.to(self.device, self._item.planned.dtype)


def merged_rows(
    matrix: WeightRows, item: MergeItem, delta: Delta | None, checks: FourBitChecks
) -> Iterator[tuple[int, Tensor]]:
    """First row and merged rows of each part, on the CPU.

    Raises:
        StageError: inf or NaN in the merged weights.
    """
    for first, rows in _nf4(matrix, item.module, checks.records) if item.module else _plain(matrix):
        if delta is not None:
            summed = rows.to(torch.float32, copy=True)  # it is changed in place
            changed = delta.apply(summed.flatten() if matrix.is_bias else summed, first)
            if item.module:
                original = matrix.read(first, first + len(rows))
                checks.norms.add(item.module, original=original, dequantized=rows, merged=changed)
            rows = changed.to(item.planned.dtype)
            _check_finite(rows, item.planned.name)
        yield first, rows.cpu()


def _plain(matrix: WeightRows) -> Iterator[tuple[int, Tensor]]:
    for first, last in matrix.spans:
        yield first, matrix.read(first, last)


def _nf4(matrix: WeightRows, module: str, records: Records) -> Iterator[tuple[int, Tensor]]:
    """The rows as NF4 makes them, compared with the record."""
    parts = (matrix.read(first, last) for first, last in matrix.spans)
    shape = matrix.rows, matrix.columns
    weight = quantize(parts, shape, device=matrix.device, trained_on_cpu=records.trained_on_cpu)
    places, samples = torch.tensor(sample_positions(matrix.rows * matrix.columns)), []
    for first, last in matrix.spans:
        rows = weight.rows(first, last)
        begin, end = first * matrix.columns, last * matrix.columns
        inside = places[(places >= begin) & (places < end)] - begin
        samples.append(rows.flatten()[inside.to(rows.device)].cpu())
        yield first, rows
    records.compare(module, weight, torch.cat(samples))


def _check_finite(rows: Tensor, name: str) -> None:
    if not all(bound.isfinite() for bound in torch.aminmax(rows)):  # NaN goes through; isfinite of all takes 15 times
        raise StageError.of(
            what="the merged weights hold inf or NaN",
            where=name,
            why="the adapter itself has none, so the base's file is damaged or the sum leaves bf16's range",
            next="download the base again; train again with a lower train.learning_rate",
        )
