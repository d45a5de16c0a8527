"""Records of any number -> rows.parquet: first to a scratch file, since only all of them show which are equal."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recipes.data.rows import SIDES, STAYS
from tasks.jobs.preparing.records import ROWS, Keys

pc: Any = pyarrow.compute  # its functions are made when it is imported: no types
GROUP_ROWS, GROUP_BYTES = 10_000, 64 << 20  # of a row group of rows.parquet: what a reader holds at a time


class Counts(NamedTuple):
    """Of the records that are kept, by side; and the groups of all sides."""

    rows: dict[str, int]
    groups: dict[str, int]
    all_groups: int


class RecordFile:
    """Records in the order of rows.parquet, on disk; some 50 bytes of each are in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, ROWS)
        self._keys, self._groups = bytearray(), array("Q")
        self._sides, self._prompted = array("b"), array("b")

    def __len__(self) -> int:
        return len(self._groups)

    def write(self, batch: pa.RecordBatch, keys: Sequence[Keys]) -> None:
        """Append records."""
        for key in keys:
            self._keys += key.turns + key.tokens + key.identity
        self._groups.extend(map(_number, batch["group"].to_pylist()))
        self._sides.extend(map(STAYS.index, batch["split"].to_pylist()))
        self._prompted.extend(pc.greater(pc.list_value_length(batch["prompt_ids"]), 0).to_pylist())
        self._writer.write_batch(batch)

    def distinct(self) -> NDArray[np.bool_]:
        """True where neither the turns nor the token ids are those of a record before it.

        Rows that differed only in dropped turns are equal now; the copy in test stays, so that no test row is in train.
        So are samples of conversations with the same beginning: the one with an answer to score stays. On one side
        records with other identity columns are other records.
        """
        sides, prompted = np.frombuffer(self._sides, np.int8), np.frombuffer(self._prompted, np.bool_)
        order = np.lexsort((~prompted, sides))  # stable: by name within these
        keys, identities = np.frombuffer(self._keys, np.uint64).reshape(-1, 5)[order], slice(4, 5)
        keep = np.ones(len(self), dtype=np.bool_)
        for own in (slice(0, 2), slice(2, 4)):
            first = _first_of_equal(keys[:, own])
            keep[order] &= sides[order] == sides[order][first]
            same = np.hstack([keys[:, own], keys[:, identities]])
            keep[order] &= _first_of_equal(same) == np.arange(len(self))
        return keep

    def count(self, keep: NDArray[np.bool_]) -> Counts:
        """Records and groups of each side."""
        sides, groups = np.frombuffer(self._sides, np.int8)[keep], np.frombuffer(self._groups, np.uint64)[keep]
        own = {split: groups[sides == STAYS.index(split)] for split in SIDES}
        return Counts(
            rows={split: len(numbers) for split, numbers in own.items()},
            groups={split: len(np.unique(numbers)) for split, numbers in own.items()},
            all_groups=len(np.unique(groups)),
        )

    def batches(self, keep: NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
        """The kept records in their order; none can be written any more."""
        self._writer.close()
        self._sink.close()
        place = 0
        with pa.OSFile(str(self._path), "rb") as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                yield batch.filter(pa.array(keep[place : place + len(batch)]))
                place += len(batch)


def write_rows(batches: Iterator[pa.RecordBatch], path: Path) -> dict[str, Any]:
    """Write rows.parquet in row groups of moderate size; what the summary says of its rows."""
    written = _Written()
    with pq.ParquetWriter(path, ROWS) as writer:
        for group in _row_groups(batches):
            written.add(group)
            writer.write_table(group, row_group_size=len(group))
    return written.summary()


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The batches in groups that are full at GROUP_ROWS or GROUP_BYTES."""
    group: list[pa.RecordBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(map(len, group)) >= GROUP_ROWS or sum(part.nbytes for part in group) >= GROUP_BYTES:
            yield pa.Table.from_batches(group, schema=ROWS)
            group = []
    if sum(map(len, group)):
        yield pa.Table.from_batches(group, schema=ROWS)


class _Written:
    """Counts of the rows written so far; four bytes of each row are in memory."""

    def __init__(self) -> None:
        self._lengths = array("i")
        self._domains = {name: Counter[str]() for name in SIDES}
        self._tokens, self._trained = Counter[str](), Counter[str]()
        self._truncated = self._dropped = 0

    def add(self, group: pa.Table) -> None:
        lengths = pc.list_value_length(group["input_ids"])
        self._lengths.extend(lengths.to_pylist())
        table = group.select(["split", "domain"]).append_column("tokens", lengths)
        table = table.append_column("trained", _trained(group["completion_mask"]))
        sums = table.group_by(["split", "domain"]).aggregate([("tokens", "sum"), ("trained", "sum"), ([], "count_all")])
        for line in sums.to_pylist():
            split = line["split"]
            self._domains[split][line["domain"]] += line["count_all"]
            self._tokens[split] += line["tokens_sum"]
            self._trained[split] += line["trained_sum"]
        self._truncated += pc.sum(pc.greater(group["dropped_turns"], 0)).as_py()
        self._dropped += pc.sum(group["dropped_turns"]).as_py()

    def summary(self) -> dict[str, Any]:
        lengths = np.frombuffer(self._lengths, np.int32)
        return {
            "domains": {name: dict(sorted(self._domains[name].items())) for name in SIDES},
            "tokens": {name: self._tokens[name] for name in SIDES},
            "completion_tokens": {name: self._trained[name] for name in SIDES},
            "length_tokens": {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90, 99, 100)},
            "truncated_rows": self._truncated,
            "dropped_turns": self._dropped,
        }


def _trained(masks: pa.ChunkedArray) -> pa.Array:
    """How many tokens each mask says True of."""
    lengths = pc.list_value_length(masks).to_numpy()
    inside = np.concatenate(([0], np.cumsum(pc.list_flatten(masks).to_numpy(), dtype=np.int64)))
    stops = np.cumsum(lengths, dtype=np.int64)
    return pa.array(inside[stops] - inside[stops - lengths])


def _first_of_equal(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Of each row of `keys` the place of the first row that equals it.

    Args:
        keys: [rows, words of a key].
    """
    order = np.lexsort(keys.T)  # stable
    changes = np.ones(len(order), dtype=np.bool_)
    changes[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(changes)][np.cumsum(changes) - 1]
    return first


def _number(group: str) -> int:
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big")
