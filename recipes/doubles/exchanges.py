"""Exchanges: an answer that is trained, with all turns before it. One of train that is in dev or test is a leak.

Rows that go on from one conversation share exchanges without being near-duplicates as a whole.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from recipes.data.turns import Message


class Exchanges:
    """The exchanges of rows as 64-bit hashes: 8 bytes each, and 8 a row."""

    def __init__(self) -> None:
        """No rows yet."""
        self._hashes = array("Q")
        self._sizes = array("q")

    def add(self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Take the next row.

        Args:
            turns: In the form of recipes/data/turns.py. An answer that nothing was asked before, as a greeting that all
                rows begin with, is none.
            tools: Of the row.
        """
        before = len(self._hashes)
        history, asked = xxh3_64(_text(tools or [])), False
        for turn in turns:
            said = _text({name: value for name, value in turn.items() if name != "train"})
            if turn["role"] == "assistant" and asked and turn.get("train") is not False:
                exchange = history.copy()
                exchange.update(said)
                self._hashes.append(exchange.intdigest())
            history.update(said)
            asked = asked or turn["role"] in ("user", "tool")
        self._sizes.append(len(self._hashes) - before)

    def shared(self, train: NDArray[np.bool_], held: NDArray[np.bool_]) -> list[tuple[int, int]]:
        """Rows of train that share an exchange with a held-out one, each with the first such row.

        Args:
            train: [rows] whether a row is in train.
            held: [rows] whether it is in dev or test.
        """
        hashes = np.frombuffer(self._hashes, np.uint64)
        rows = np.repeat(np.arange(len(self._sizes)), np.asarray(self._sizes, np.int64))
        asked, first = np.unique(hashes[held[rows]], return_index=True)
        if not len(asked):
            return []
        owners = rows[held[rows]][first]
        own, row = hashes[train[rows]], rows[train[rows]]
        places = np.minimum(np.searchsorted(asked, own), len(asked) - 1)
        equal = asked[places] == own
        leaks, at = np.unique(row[equal], return_index=True)
        return list(zip(leaks.tolist(), owners[places[equal]][at].tolist(), strict=True))


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n"
