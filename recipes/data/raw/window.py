"""A sliding part of a JSON text: values are decoded one after another, and what is behind is let go."""

from __future__ import annotations

import json
import re
from typing import Any, TextIO

from recipes.data.raw.row import Unread
from recipes.data.raw.strict import DECODER, check, reason

CHUNK = 1 << 18  # characters
NEAR = 20  # characters that show where something is wrong
CUT = 16  # a literal or an escape that the end of the window cuts is shorter
SPACE = re.compile(r"[ \t\n\r]*")
LIST = re.compile(r"\[[ \t\n\r]*(.?)")
TOKENS = re.compile(r'\\.|["{}\[\],\n]')
STEPS = {"{": 1, "[": 1, "}": -1, "]": -1}


class TooLong(Exception):
    """A value goes on behind the limit."""


class Window:
    """A part of a text, from the place that is read to as far as a value needs.

    Attributes:
        line: Number of the line that is read, from 1.
    """

    def __init__(self, stream: TextIO, *, chunk: int = CHUNK) -> None:
        self.line = 1
        self._stream = stream
        self._chunk = chunk
        self._text = ""
        self._at = 0
        self._behind = 0  # end of the token that is looked at
        self._ended = False

    def peek(self) -> str:
        """The next character that is no white space, which is skipped; nothing at the end of the text."""
        while True:
            match = SPACE.match(self._text, self._at)
            self._to(match.end() if match else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, char: str) -> bool:
        """Whether the next character is this one, which is skipped then."""
        if self.peek() != char:
            return False
        self._to(self._at + 1)
        return True

    def value(self) -> Any:
        """Decode the next value, and go behind it.

        Raises:
            Unread: It is not JSON, or JSON that no row may hold. The window stays before it.
        """
        value = self.ahead()
        self._to(self._behind)
        return value

    def ahead(self, limit: int | None = None) -> Any:
        """Decode the next value, and stay before it.

        Args:
            limit: Characters that are looked at.

        Raises:
            Unread: It is not JSON, or JSON that no row may hold.
            TooLong: It does not end within `limit`.
        """
        self.peek()
        while True:
            try:
                value, self._behind = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._is_cut(error) or not self._more(limit):
                    raise Unread(self._explained(error)) from None
            except (RecursionError, ValueError) as error:
                raise Unread(reason(error)) from None
            else:
                is_number = isinstance(value, int | float) and self._behind >= len(self._text) - CUT  # may go on
                if not is_number or not self._more(limit):
                    check(value, self._text[self._at : self._behind])
                    return value

    @property
    def is_last(self) -> bool:
        """Whether nothing follows the value that `ahead` gave."""
        behind = self._behind - self._at
        while not self._text[self._at + behind :].strip():
            if not self._more():
                return True
        return False

    def starts_rows(self) -> bool:
        """Whether the next value is a list of objects, by its first one."""
        self.peek()
        while not (match := LIST.match(self._text, self._at)) or match.end() == len(self._text):
            if not self._more():
                break
        return match is not None and match[1] == "{"

    def skip(self, *, listed: bool) -> None:
        """Go behind a value that is not JSON, as far as its brackets and quotation marks tell.

        Args:
            listed: It is in a list, and the comma or bracket behind it stays; else it is one of several values that
                follow each other, each at the start of a line.
        """
        depth, quoted = 0, False
        while token := self._token():
            if token == "\n":
                quoted = False  # no text goes over the end of a line
            elif token == '"':
                quoted = not quoted
            step = 0 if quoted else STEPS.get(token, 0)
            is_behind = depth + step < 0 or (depth == 0 and token == "," and not quoted)
            if listed and is_behind:
                return
            depth = max(0, depth + step)
            self._to(self._behind)
            if depth == 0 and (step < 0 or token == "\n"):
                return
            if not listed and token == "\n" and self._text.startswith("{", self._at):
                return  # a row was not closed, and the next one begins
        self._to(len(self._text))

    def _token(self) -> str:
        """The next bracket, comma, quotation mark, escape or line end; nothing at the end of the text."""
        while True:
            match = TOKENS.search(self._text, self._at)
            if match and match.end() < len(self._text):
                break
            if not self._more():
                break
        if match is None:
            return ""
        self._behind = match.end()
        return match[0]

    def _explained(self, error: json.JSONDecodeError) -> str:
        line = self.line + self._text.count("\n", self._at, error.pos)
        near = self._text[error.pos : error.pos + NEAR]
        return f"is not JSON ({error.msg}: line {line}, " + (f"near {near!a})" if near else "where the file ends)")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could make it JSON."""
        return error.pos >= len(self._text) - CUT or error.msg.startswith("Unterminated string")

    def _to(self, place: int) -> None:
        self.line += self._text.count("\n", self._at, place)
        self._at = place

    def _more(self, limit: int | None = None) -> bool:
        """Read on, as much again as is held: a long value is tried a few times only."""
        held = len(self._text) - self._at
        if limit is not None and held >= limit:
            raise TooLong
        if self._ended:
            return False
        read = self._stream.read(max(self._chunk, held))
        if not read:
            self._ended = True
            return False
        self._text, self._at = self._text[self._at :] + read, 0
        return True
