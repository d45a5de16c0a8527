"""Rows are rendered in chunks, in order, by as many processes as the job has CPU slots.

Processes, since more than half of the time goes to Python: Jinja, masks, checks. They are forked, so they share the
open tokenizer and the spool.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.jobs.preparing.records import ROWS, RenderedRows, render
from tasks.jobs.preparing.spool import Spool
from tasks.jobs.text.rendering import Renderer
from tasks.runtime.process.child import die_with_parent

AHEAD = 2  # chunks a worker that are rendered before they are asked for
FEW_ROWS = 2000  # are rendered before a pool has started


class RenderedChunk(NamedTuple):
    """Some rows of the spool.

    Attributes:
        size: How many.
        batch: Their records.
        rows: What else is told of them; of another process without the records themselves.
    """

    size: int
    batch: pa.RecordBatch
    rows: RenderedRows


class ChunkRenderer(NamedTuple):
    """What renders rows by their places in the spool."""

    spool: Spool
    renderer: Renderer
    max_length: int

    def chunk(self, places: Sequence[int]) -> RenderedChunk:
        """Render some rows."""
        rows = render([self.spool[place] for place in places], self.renderer, max_length=self.max_length)
        batch = pa.RecordBatch.from_pylist(rows.records, schema=ROWS)
        return RenderedChunk(len(places), batch, rows)

    def chunks(self, places: NDArray[np.int64], *, processes: int) -> Iterator[RenderedChunk]:
        """All rows at these places, in this order; what comes out does not depend on the number of processes."""
        chunks = self.spool.chunks(places)
        if processes == 1 or len(places) < FEW_ROWS:
            yield from map(self.chunk, chunks)
            return
        forked = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=forked, initializer=_start, initargs=(self,)) as pool:
            waiting: deque[Future[RenderedChunk]] = deque()
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


_here: list[ChunkRenderer] = []  # of a worker: set once, when it is forked


def _start(renderer: ChunkRenderer) -> None:
    die_with_parent()
    _here.append(renderer)


def _work(places: Sequence[int]) -> RenderedChunk:
    made = _here[0].chunk(places)
    return made._replace(rows=replace(made.rows, records=[]))
