"""Texts into token ids, those of many rows in one call.

What makes a row of token ids is written once, as a generator: it yields the texts that it has to know the tokens of,
and is sent them. `alone` runs one such generator, `side_by_side` runs a thousand, and tokenises what they all ask for
in one call, which the tokenizer spreads over its threads.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from tasks.jobs.text.conversation import RowError

SIDE_BY_SIDE = 1000  # rows whose texts are tokenised in one call


class Encoded(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: Token ids, without tokens that the tokenizer would add.
        encoding: The tokenizer's own map from characters to tokens; None of a slow tokenizer, which has none.
    """

    ids: list[int]
    encoding: Any

    def tokens_of(self, start: int, stop: int) -> range:
        """Places of the tokens that hold any of the characters [start, stop); empty where none does."""
        first, last = (
            next((place for char in chars if (place := self.encoding.char_to_token(char)) is not None), None)
            for chars in (range(start, stop), range(stop - 1, start - 1, -1))
        )
        if first is None or last is None:
            return range(0)
        behind = last + 1  # a character may have several tokens
        while behind < len(self.ids) and self._begins_before(behind, stop):
            behind += 1
        return range(first, behind)

    def _begins_before(self, place: int, char: int) -> bool:
        chars = self.encoding.token_to_chars(place)
        return chars is not None and chars[0] < char


Made = TypeVar("Made")
Reading = Generator[list[str], list[Encoded], Made]


def encode(tokenizer: Any, texts: list[str]) -> list[Encoded]:
    """The tokens of rendered texts: nothing is added, special tokens in the text are special tokens."""
    if not texts:
        return []
    both = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
    return [
        Encoded(ids, encoding)
        for ids, encoding in zip(both["input_ids"], both.encodings or [None] * len(texts), strict=True)
    ]


def alone(reading: Reading[Made], tokenizer: Any) -> Made:
    """What one reading makes.

    Raises:
        RowError: Of the reading.
    """
    try:
        texts = next(reading)
        while True:
            texts = reading.send(encode(tokenizer, texts))
    except StopIteration as end:
        return end.value


def side_by_side(readings: Iterable[Reading[Made]], tokenizer: Any) -> Iterator[Made | RowError]:
    """What each reading makes, or why it refuses its row, in their order; no more than SIDE_BY_SIDE are held."""
    rest = iter(readings)
    while batch := list(islice(rest, SIDE_BY_SIDE)):
        yield from _batch(batch, tokenizer)


def _batch(readings: Sequence[Reading[Made]], tokenizer: Any) -> list[Made | RowError]:
    made: dict[int, Made | RowError] = {}
    sent: dict[int, list[Encoded] | None] = dict.fromkeys(range(len(readings)))
    while sent:
        asked: dict[int, list[str]] = {}
        for number, tokens in sent.items():
            try:
                asked[number] = next(readings[number]) if tokens is None else readings[number].send(tokens)
            except StopIteration as end:
                made[number] = end.value
            except RowError as error:
                made[number] = error
        tokens = iter(encode(tokenizer, [text for texts in asked.values() for text in texts]))
        sent = {number: list(islice(tokens, len(texts))) for number, texts in asked.items()}
    return [made[number] for number in range(len(readings))]
