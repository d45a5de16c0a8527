"""JSON as strict as rows have to be: what would change its meaning, or break a later step, is refused here by name.

Duplicate keys (the last one would win in silence), NaN and numbers beyond 64 bits of floating point, half surrogate
pairs, NUL characters, nesting deeper than any later step follows.
"""

from __future__ import annotations

import json
import re
from typing import Any

from recipes.data.raw.row import Unread
from recipes.plain import is_list, is_mapping

DEEPEST = 100  # levels of nesting; Python's own limit of 1,000 calls counts those of the caller, so it moves
LINE_ENDS = ("\n", "\r\n", "")
ESCAPES = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
HALF_PAIR = "holds half of a surrogate pair, which no tokenizer reads"
NUL = "holds a NUL character, which ends a text in many programs"
TOO_DEEP = f"is nested deeper than {DEEPEST} levels"
NOT_UTF8 = "is not UTF-8"


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        Unread: It is not JSON, or JSON that no row may hold.
    """
    try:
        value = _decoded(text)
    except json.JSONDecodeError as error:
        raise Unread(f"is not JSON ({error.msg}: column {error.pos + 1})") from None
    except (RecursionError, ValueError) as error:
        raise Unread(reason(error)) from None
    check(value, text)
    return value


def _decoded(text: str) -> Any:
    """The most common line in the fastest way: `decode` looks for white space before and behind, which takes 1 us."""
    if text.startswith("{"):
        value, end = DECODER.raw_decode(text)
        if text[end:] in LINE_ENDS:
            return value
    return DECODER.decode(text)


def reason(error: RecursionError | ValueError) -> str:
    """Why the decoder gave up on a text that may well be JSON."""
    if isinstance(error, Unread):
        return str(error)
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return "holds an integer with thousands of digits"  # Python's own limit of 4,300


def check(value: Any, text: str) -> None:
    """Look at a decoded value, where its text shows that there may be something to see.

    Args:
        value: Of any shape.
        text: That it was decoded from; undecodable bytes stand in it as half surrogate pairs.

    Raises:
        Unread: It is nested too deep, or holds what no tokenizer reads.
    """
    if not text.isascii() and not is_unicode(text):
        raise Unread(NOT_UTF8)
    brackets = text.count("{") + text.count("[")
    if brackets > DEEPEST or ("\\u" in text and ESCAPES.search(text)):
        _check_inside(value)


def check_text(text: str) -> None:
    """Refuse a text that no tokenizer reads.

    Raises:
        Unread: It holds a NUL character or half of a surrogate pair.
    """
    if "\0" in text:
        raise Unread(NUL)
    if not text.isascii() and not is_unicode(text):
        raise Unread(HALF_PAIR)


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_inside(value: Any) -> None:
    """Level by level, so that no depth of nesting is a depth of calls."""
    level: list[Any] = [value]
    depth = 0
    while level:
        inner: list[Any] = []
        depth += any(is_mapping(item) or is_list(item) for item in level)
        if depth > DEEPEST:
            raise Unread(TOO_DEEP)
        for item in level:
            if isinstance(item, str):
                check_text(item)
            elif is_mapping(item):
                inner += [*item, *item.values()]
            elif is_list(item):
                inner += item
        level = inner


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Unread(f"has the key {twice!a} twice in one object")
    return value


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise Unread(f"holds a number that is too large: {text[:40]}")
    return value


def _constant(text: str) -> Any:
    raise Unread(f"holds {text}, which is no JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
