"""Texts as sets of 5-grams, kept as 64-bit hashes in a file: what near-duplicates are told by.

A gram is five units in a row. A unit is a word; in writing without spaces (Chinese, Japanese, Thai, Lao, Khmer,
Burmese, Tibetan) it is a character, also where such writing stands between words. A text whose words are longer than
20 characters on average (a URL, minified code) is taken by character as a whole.

Five in both cases: a changed unit costs five grams, so that the same limit allows the same share of changed units. Five
characters are two to three words of Chinese and one to two of Thai: short enough to survive an edit nearby, long enough
that two texts on other subjects share few.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from recipes.data.turns import Message

Hashes: TypeAlias = NDArray[np.uint64]
GRAM = 5  # units
LONG = 20  # characters of an average word: English has 5, Finnish 8, code with spaces 10
BATCH = 1 << 18  # units (in writing) or grams (in reading) that are held at once: 2 MiB, several times
SMALL = 1 << 12  # grams of a text that is kept for the next comparison: 1,024 of them are 32 MiB
STEP = np.uint64(0x9E3779B97F4A7C15)  # odd; of the polynomial over the units of a gram
# Scripts written without spaces, with their punctuation, by Unicode block (16.0).
UNSPACED = (
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f"  # Myanmar, Khmer, Tai scripts, Balinese
    "\u2e80-\u312f\u31a0-\u31ff"  # radicals, CJK punctuation, Hiragana, Katakana, Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf"  # Han, Yi
    "\ua980-\ua9ff\uaa60-\uaadf"  # Javanese, Myanmar and Tai extensions
    "\uf900-\ufaff\uff00-\uff9f"  # Han, full-width forms, half-width Katakana
    "\U00016fe0-\U0001b2ff\U00020000-\U0003ffff"  # Tangut, Kana and Han extensions
)
IS_UNSPACED = re.compile(f"[{UNSPACED}]")
UNIT = re.compile(rf"(?!\s)[{UNSPACED}]|[^\s{UNSPACED}]+")  # U+3000 is a space


def compared_text(turns: Sequence[Message]) -> str:
    """What of a row is compared: what its turns say and call.

    Without system turns: a long one in all rows would make all of them similar.
    """
    parts: list[str] = []
    for turn in turns:
        if turn["role"] not in ("system", "developer"):
            parts += [turn.get("reasoning_content") or "", turn.get("content") or ""]
            parts += [json.dumps(call, ensure_ascii=False, sort_keys=True) for call in _calls(turn)]
    return " ".join(parts)


def _calls(turn: Message) -> list[Any]:
    calls: list[dict[str, Any]] = turn.get("tool_calls") or []
    return [call.get("function", call) for call in calls]


def units(text: str) -> Sequence[str]:
    """Words; characters where the writing has no spaces."""
    unspaced = not text.isascii() and IS_UNSPACED.search(text)
    words = UNIT.findall(text) if unspaced else text.split()
    return "".join(words) if sum(map(len, words)) > LONG * len(words) else words


class Grams:
    """The distinct grams of every text, sorted by hash, in the order in which the texts were written.

    Attributes:
        starts: [texts + 1] where the grams of a text begin in the file.
    """

    def __init__(self, path: Path, sizes: Sequence[int]) -> None:
        """Open the file.

        Args:
            path: Hashes, one text after the other.
            sizes: Grams of each text.
        """
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int64)
        self._file = path.open("rb")
        self._small = lru_cache(maxsize=1024)(self._read)

    def __len__(self) -> int:
        """How many texts."""
        return len(self.starts) - 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def of(self, text: int) -> Hashes:
        """[grams] of one text, by its number."""
        start, end = int(self.starts[text]), int(self.starts[text + 1])
        return self._small(start, end) if end - start <= SMALL else self._read(start, end)

    def batches(self) -> Iterator[Batch]:
        """All of them, some 260,000 grams at once."""
        first = 0
        while first < len(self):
            limit = int(self.starts[first]) + BATCH
            last = max(first + 1, int(np.searchsorted(self.starts, limit, side="right")) - 1)
            starts = self.starts[first : last + 1]
            yield Batch(first, last, self._read(int(starts[0]), int(starts[-1])), starts[:-1] - starts[0])
            first = last

    def _read(self, start: int, end: int) -> Hashes:
        # Not a memory map: its pages would count as memory of this process.
        return np.frombuffer(os.pread(self._file.fileno(), 8 * (end - start), 8 * start), np.uint64)


class Batch(NamedTuple):
    """Some texts one after the other.

    Attributes:
        first: Number of the first text.
        last: Number behind that of the last text.
        grams: [grams] of all of them.
        starts: [last - first] where each text's grams begin; every text has at least one.
    """

    first: int
    last: int
    grams: Hashes
    starts: NDArray[np.int64]


class GramWriter:
    """Writes the grams of one text after the other; memory does not grow with the texts but for 8 bytes each."""

    def __init__(self, path: Path) -> None:
        """Make the file. It takes 8 bytes a word, and 8 a character where the writing has no spaces."""
        self.path = path
        self._file = path.open("wb")
        self._units = array("Q")
        self._ends: list[int] = []  # of the texts in _units
        self._sizes = array("q")

    def add(self, text: str) -> None:
        """Take the next text."""
        found = units(text)
        self._units.extend(map(xxh3_64_intdigest, map(str.encode, found)))
        self._units.extend([0] * (GRAM - len(found)))  # a shorter text is one gram
        self._ends.append(len(self._units))
        if len(self._units) >= BATCH:
            self._write()

    def finish(self) -> Grams:
        """What was written."""
        self._write()
        self._file.close()
        return Grams(self.path, self._sizes)

    def _write(self) -> None:
        if not self._ends:
            return
        ends = np.asarray(self._ends)
        every = np.frombuffer(self._units, np.uint64)
        places = len(every) - GRAM + 1
        hashed = np.zeros(places, np.uint64)
        for unit in range(GRAM):
            hashed = hashed * STEP + every[unit : unit + places]
        text = np.searchsorted(ends, np.arange(places), side="right")
        inside = np.arange(places) + GRAM <= ends[text]
        hashed, text = mixed(hashed[inside]), text[inside]
        order = np.lexsort((hashed, text))
        hashed, text = hashed[order], text[order]
        first = np.ones(len(hashed), bool)
        first[1:] = (hashed[1:] != hashed[:-1]) | (text[1:] != text[:-1])
        self._file.write(hashed[first].tobytes())
        self._sizes.extend(np.bincount(text[first], minlength=len(ends)).tolist())
        del every  # the array cannot shrink while it is looked at
        self._units, self._ends = array("Q"), []


def mixed(values: Hashes) -> Hashes:
    """Every bit of a value depends on all of its bits (the finalizer of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))
