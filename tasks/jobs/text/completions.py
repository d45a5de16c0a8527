"""Which tokens of a row are an assistant turn, up to the token that ends it: by markers, or by prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.encoding import Encoded


class SeamError(RowError):
    """What is trained does not begin as the prompt does that an answer is decoded from."""


@dataclass(frozen=True, kw_only=True)
class Completions:
    """How a tokenizer and its template begin and end an assistant turn.

    Attributes:
        tokenizer: To read single tokens.
        end_of_turn: Id of the special token that ends an assistant turn.
        opening: Ids of the generation prompt.
        special: Ids of all special tokens: some templates end tool calls with another one.
    """

    tokenizer: Any
    end_of_turn: int
    opening: list[int]
    special: frozenset[int]

    def between_markers(
        self, chat: Conversation, whole: Encoded, markers: list[tuple[int, int]] | None
    ) -> list[bool] | None:
        """Mask from a template's generation markers, each span from the generation prompt to the turn's end.

        Markers may hold the line ends behind both (TRL's for Qwen2.5) or a whole header: a model never writes these.
        None where there are no markers, no map from characters to tokens, the end of a turn is left out, or turns are
        not trained and markers do not tell turns apart.
        """
        if markers is None or whole.encoding is None:
            return None
        mask = [False] * len(whole.ids)
        for start, stop in markers:
            places = whole.tokens_of(start, stop)
            mask[places.start : places.stop] = [True] * len(places)
        pieces = spans(mask)
        answers = [number for number, turn in enumerate(chat.turns, start=1) if turn["role"] == "assistant"]
        if self._trim(mask, whole.ids) < len(answers):
            return None
        if chat.trained != answers:
            if len(pieces) != len(answers):
                return None
            for number, (start, stop) in zip(answers, pieces, strict=True):
                if number not in chat.trained:
                    mask[start : stop + 1] = [False] * len(mask[start : stop + 1])
        return mask

    def turn(self, number: int, *, ids: list[int], before: list[int], until: list[int]) -> range:
        """Places in `ids` of a turn, up to the token that ends it.

        Verified: the history with the generation prompt (`before`), and the turns up to this one's end (`until`), are
        prefixes of `ids`.

        Raises:
            RowError: They are not, or the turn is empty or has no end.
        """
        last = self._end(until, len(before), len(until))
        stop = len(before) if last is None else last + 1
        if until[: len(before)] != before:
            raise SeamError(
                f"turn {number}: it does not begin with the tokens of the history and the generation prompt, by the "
                "template or by a token that spans the seam, so the completion's tokens cannot be found"
            )
        if ids[:stop] != until[:stop]:
            raise RowError(f"turn {number}: the template renders the turns up to it differently from the whole row")
        if last is None:
            raise RowError(f"turn {number}: no special token ends it, so the model would not learn to stop")
        if last == len(before):
            raise RowError(f"turn {number}: the template renders nothing of it")
        return range(len(before), stop)

    def _trim(self, mask: list[bool], ids: list[int]) -> int:
        """Let every span begin behind the generation prompt and end with the turn; how many ends there are."""
        ends = {place for place, token in enumerate(ids) if mask[place] and token == self.end_of_turn}
        for start, stop in spans(mask):
            begin = self._behind_opening(ids, start, stop)
            mask[start:begin] = [False] * (begin - start)
            end = self._end(ids, start, stop)
            if end is None and stop < len(ids) and ids[stop] == self.end_of_turn:
                end, mask[stop] = stop, True
            if end is not None:
                mask[end + 1 : stop] = [False] * len(mask[end + 1 : stop])
                ends.add(end)
        return len(ends)

    def _behind_opening(self, ids: list[int], start: int, stop: int) -> int:
        """Where the generation prompt, or as much of it as stands there, ends in ids[start:stop]; else `start`."""
        for length in range(len(self.opening), 0, -1):
            for end in range(start + 1, min(start + length, stop) + 1):
                if ids[max(0, end - length) : end] == self.opening[:length]:
                    return end
        return start

    def _end(self, ids: list[int], start: int, stop: int) -> int | None:
        """Place of the token that ends a turn in ids[start:stop]; behind it only white space and special tokens.

        The end-of-turn token, else the last special one (`<|eom_id|>`, `<|call|>` behind tool calls).
        """
        last_special = None
        for place in range(stop - 1, start - 1, -1):
            if ids[place] == self.end_of_turn:
                return place
            if ids[place] in self.special:
                last_special = place if last_special is None else last_special
            elif self.tokenizer.decode([ids[place]]).strip():
                break
        return last_special


def spans(mask: list[bool]) -> list[tuple[int, int]]:
    """[start, stop) of every run of True."""
    runs: list[tuple[int, int]] = []
    stop = 0
    while True in mask[stop:]:
        start = mask.index(True, stop)
        stop = mask.index(False, start) if False in mask[start:] else len(mask)
        runs.append((start, stop))
    return runs
