"""The same rows, order, batches and tokens for every arm: teacher forcing over completions.

Reference and evaluate share this. bf16 sums depend on the shape of a product a little; with equal batches, cut into
equal tiles, the reference scored against itself gives a KL of exactly 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import Cache

from tasks.jobs.measuring.tiles import Model, each_tile
from tasks.runtime.process.errors import StageError

Kept = TypeVar("Kept")
Caches = Callable[[], Cache]
"""An empty KV cache for a batch."""
# Of one tensor in fp64; a KL holds five at a time. On a CPU memory that malloc gives out again (over 32 MiB it asks the
# system each time); on a GPU few launches: 32 tokens of a vocabulary of 262,144.
PART_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
# Column of rows.parquet behind each field of a TokenRow.
COLUMNS = {name: name for name in ("row", "group", "split", "domain", "prompt_ids", "answer", "columns")}
COLUMNS |= {"ids": "input_ids", "counted": "completion_mask"}


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A row of the dataset in tokens, or a text of the general hold-out (split `general`, every token counts).

    Attributes:
        ids: Token ids, T of them.
        counted: T booleans: the token is predicted and counts (a completion token; never the first of the row).
        prompt_ids: True history of the last assistant turn, for the task; empty where this sample has none to answer.
    """

    row: str
    group: str
    split: str
    ids: list[int]
    counted: list[bool]
    domain: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    answer: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Tokens that count."""
        return sum(self.counted)

    @property
    def answer_tokens(self) -> int:
        """Tokens of the last turn, as the data has it."""
        return len(self.ids) - len(self.prompt_ids)

    def read_as(self, ids: list[int], *, counted: list[bool], prompt_ids: list[int]) -> TokenRow:
        """The same row in other tokens."""
        return TokenRow(
            row=self.row,
            group=self.group,
            split=self.split,
            ids=ids,
            counted=counted,
            domain=self.domain,
            prompt_ids=prompt_ids,
            answer=self.answer,
            columns=self.columns,
        )


class StoredRow(TokenRow):
    """A row in Arrow columns, 4 bytes a token: its lists are made each time that they are asked for."""

    def __init__(self, table: pa.Table, place: int) -> None:
        self.__dict__.update(_table=table, _place=place)

    def __getattribute__(self, name: str) -> Any:
        """A field is read from its column."""
        if name not in COLUMNS:
            return super().__getattribute__(name)
        value = self._table[COLUMNS[name]][self._place].as_py()
        if name == "counted":
            return [False, *value[1:]]
        return json.loads(value) if name == "columns" else value


class Stretch(NamedTuple):
    """What a model predicts for m tokens of a row that follow each other: all of the row but its first, or a part.

    Attributes:
        row: The row.
        every: [m, vocabulary] in the model's output type; memory that the next tile needs.
        followed: [m] the tokens that came.
        counted: [k] places in both of the tokens that count.
        before: Tokens of the row that count and come before these.
    """

    row: TokenRow
    every: Tensor
    followed: Tensor
    counted: Tensor
    before: int

    @property
    def part(self) -> int:
        """Tokens whose logits are in fp32 or fp64 at once."""
        device = "cpu" if self.every.device.type == "cpu" else "cuda"
        return max(1, PART_BYTES[device] // (8 * self.every.shape[-1]))

    def losses(self) -> Tensor:
        """[m] -log p in nats, fp64."""
        chosen = self.every.gather(-1, self.followed.unsqueeze(-1)).squeeze(-1).double()
        whole = [part.float().logsumexp(-1).double() for part in self.every.split(self.part)]
        return torch.cat(whole) - chosen

    def is_finite(self) -> bool:
        """No inf and no NaN: 0.7 us per token of 4,096; isfinite of each logit 10.7."""
        return bool(torch.isfinite(self.every.sum(-1, dtype=torch.float32)).all())


def read_rows(dataset: Path, *splits: str) -> list[TokenRow]:
    """Rows of some splits, in the order of the file; they stay in Arrow columns."""
    table = pq.read_table(dataset / "rows.parquet", columns=list(COLUMNS.values()), filters=[("split", "in", splits)])
    return [StoredRow(table, place) for place in range(len(table))]


def read_general(dataset: Path) -> list[TokenRow]:
    """The general hold-out; empty where the recipe names none."""
    return [
        TokenRow(
            row=line["row"],
            group=line["row"],
            split="general",
            ids=line["input_ids"],
            counted=[False, *[True] * (len(line["input_ids"]) - 1)],
        )
        for line in pq.read_table(dataset / "general.parquet").to_pylist()
    ]


def batches(rows: Sequence[TokenRow], size: int, *, key: Callable[[TokenRow], int]) -> list[list[TokenRow]]:
    """Rows by falling length (the largest batch fails first), ties by row, in batches of `size`."""
    ordered = sorted(rows, key=lambda row: (-key(row), row.row))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@torch.inference_mode()
def forced(
    model: Model, rows: Sequence[TokenRow], keep: Callable[[Stretch], Kept], caches: Caches | None = None
) -> list[list[Kept]]:
    """Teacher forcing on one batch, padded on the right, through a KV cache where one is given.

    Args:
        model: The model.
        rows: The batch.
        keep: Makes of a stretch what stays of it: its logits are gone when the next tile comes.
        caches: Makes an empty cache.

    Returns:
        What was kept, by row, in order; one item of a row whose tokens are in one tile.

    Raises:
        StageError: Logits are inf or NaN; names the rows.
    """
    ids, mask = padded([row.ids for row in rows], left=False)
    kept: list[list[Kept]] = [[] for _ in rows]
    broken: dict[str, None] = {}
    waiting = _Waiting(rows)

    def take(logits: Tensor) -> None:
        for number, stretch in waiting.next(logits):
            if not stretch.is_finite():
                broken[stretch.row.row] = None
            elif not broken:
                kept[number].append(keep(stretch))

    arguments: dict[str, Any] = {"past_key_values": caches(), "use_cache": True} if caches else {"use_cache": False}
    places = torch.cat([number * ids.shape[1] + torch.arange(len(row.ids) - 1) for number, row in enumerate(rows)])
    ids, mask = ids.to(model.device), mask.to(model.device)
    each_tile(model, ids, mask, places=places, take=take, **arguments)
    if broken:
        raise _not_finite(list(broken))
    return kept


class _Waiting:
    """The tokens of a batch, row after row, that have no logits yet."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self._rows = [(number, row, row.ids, row.counted) for number, row in enumerate(rows)]
        self._row, self._first = 0, 0

    def next(self, logits: Tensor) -> Iterator[tuple[int, Stretch]]:
        """Number of the row and stretch, of the rows to which the next logits [n, vocabulary] belong."""
        used = 0
        while self._row < len(self._rows):
            number, row, ids, counts = self._rows[self._row]
            first, left = self._first, len(ids) - 1 - self._first
            size = min(left, len(logits) - used)
            if left and not size:
                return
            followed = torch.tensor(ids[first + 1 : first + 1 + size], device=logits.device)  # place t predicts t + 1
            counted = torch.tensor(counts[first + 1 : first + 1 + size], device=logits.device).nonzero().squeeze(1)
            every, before = logits[used : used + size], sum(counts[1 : first + 1])
            yield number, Stretch(row, every, followed, counted, before)
            used += size
            self._row, self._first = (self._row + 1, 0) if size == left else (self._row, first + size)


def _not_finite(broken: Sequence[str]) -> StageError:
    return StageError.of(
        what=f"inf or NaN in the logits of {len(broken)} rows",
        where=f"rows {', '.join(broken[:5])}{' ...' if len(broken) > 5 else ''}",
        why="this model's figures would mean nothing, and without these rows it would look better",
        next="look at the step that made the model; an fp16 kernel on a bf16 model overflows like this",
    )


def completion_bytes(row: TokenRow, tokenizer: Any) -> int:
    """UTF-8 bytes of the text of the tokens that count, without special ones."""
    size = 0
    for counts, tokens in groupby(zip(row.counted, row.ids, strict=True), key=itemgetter(0)):
        if counts:
            ids = [token for _, token in tokens]
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            size += len(text.encode())
    return size


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [rows, longest]; id 0 where the mask is 0."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask
