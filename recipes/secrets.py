"""What is a secret, and text without it. Standard library only: everything else may import this.

Tokens come from the environment or from Prefect's secret blocks, never from a recipe. `hide` is applied wherever text
from outside is kept or shown: problems, lines of a run's log, what MLflow answers. Names of models, data sets and files
begin like keys too (`sk-learn-text`, `hf_dataset_v2`), so a key has to have the length, the alphabet and the
randomness of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import inf, log
from typing import NamedTuple
from urllib.parse import unquote

HIDDEN = "***"
LEAST = 8  # characters of a variable's value that is hidden in running text: `test` would be hidden in every word of it

_NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|(?:^|_)AUTH(?:_|$)"
)
_PLACES = re.compile(r"(?:FILE|PATH|DIR|SOCK)$")  # HF_TOKEN_PATH says where a secret lies; the path is none
_PLAIN = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")  # a password like `postgres` is in the middle of other words
# scheme://user:password@; what stands for a password (PASSWORD, $VAR, ***) is none, nor is image:tag@sha256:digest.
_URL = re.compile(
    r"(?P<before>[A-Za-z][\w+.-]{0,30}://[^\s/:@'\"]*:)(?P<value>(?!PASSWORD@|[$<{*])[^\s/@'\"]+)(?=@(?!sha\d+:))"
)
# Of `_randomness`. Of random bodies of 20 letters and digits 1 in 3,000 is below, of those that may have - and _ too 1
# in 100 (at 35 characters 1 in 2,000); of 240 names in the way of Qwen2-57B-A14B-Instruct-GPTQ-Int4 one is above.
LEAST_RANDOM = 0.25
LEAST_OF_THIS_LENGTH = 0.0  # where few names have the length: of random bodies 1 in 1,000 is below
# What a token may follow: no letter or digit, but `%3D` of a URL and `\n` of a repr.
_START = r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2})|(?<=\\[nrt]))"
_END = r"(?![A-Za-z0-9])"
_HEX = r"(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]"
_VALUE = r"(?P<value>(?P<body>[\w.~+/-]{16,})=*)"
_QUOTE = r"[\"'\\]{0,3}"
_WORD = r"(?:secret|passw(?:or)?d|passphrase|(?:api|access|secret|private)[-_]?key|token)"


class _Shape(NamedTuple):
    """A kind of secret. Group `body` of the pattern has to look random; group `value` is hidden, or all of it."""

    whose: str
    pattern: re.Pattern[str]
    least: float  # of `_randomness`
    lower: bool = False  # small letters and digits alone are enough: what stands before it says that it is a secret


def _shape(whose: str, pattern: str, *, least: float = LEAST_RANDOM, lower: bool = False) -> _Shape:
    return _Shape(whose, re.compile(pattern), least, lower)


def _token(whose: str, pattern: str, *, least: float = LEAST_RANDOM) -> _Shape:
    return _shape(whose, f"{_START}(?:{pattern}){_END}", least=least)


# Lengths and alphabets as their owners make them; the first that fits names a token.
_SHAPES = (
    _shape(
        "a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:[\s#]*Proc-Type:.*[\s#]*DEK-Info:.*)?[^-]*"
    ),
    _token("a Hugging Face token", r"(?:hf|api_org)_(?P<body>[A-Za-z0-9]{34})"),
    _token("a GitHub token", r"gh[pousr]_(?P<body>[A-Za-z0-9]{36,255})"),
    _token("a GitHub token", r"github_pat_[A-Za-z0-9]{22}_(?P<body>[A-Za-z0-9]{59})"),
    _token("a GitLab token", r"glpat-(?P<body>[\w-]{20})(?![\w-])", least=LEAST_OF_THIS_LENGTH),
    _token(
        "a GitLab token",
        r"glpat-[\w-]{20,300}\.[0-9a-z]{2}\.[0-9a-z]{7}|gl(?:pat|dt|rt|ptt|ft|soat|cbt|agent)-(?P<body>[\w-]{20,300})",
    ),
    _token("a Prefect API key", r"pn[ub]_(?P<body>[A-Za-z0-9]{36})"),
    _token("an AWS key id", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"),
    _token("a Google API key", r"AIza(?P<body>[\w-]{35})"),
    _token("a Google client secret", r"GOCSPX-[\w-]{28}"),
    _token("a Slack token", r"(?:xoxe\.)?xox[abeprs]-(?:\d+-)+[A-Za-z0-9]{18,255}|xapp-\d-[A-Z0-9]+-\d+-[0-9a-f]{64}"),
    _token("a Slack address", r"hooks\.slack\.com/services/T\w{8,12}/B\w{8,12}/\w{20,30}"),
    _token("an Anthropic API key", r"sk-ant-[a-z]+\d\d-(?P<body>[\w-]{80,120})"),
    _token(
        "an OpenAI API key", r"sk-[\w-]{20,100}T3BlbkFJ[\w-]{20,100}|sk-(?:proj|svcacct|admin)-(?P<body>[\w-]{40,200})"
    ),
    _token("an API key", rf"sk-{_HEX}{{32}}(?![\w-])|sk-or-v1-{_HEX}{{64}}"),  # DeepSeek, Qwen; OpenRouter
    _token("a Databricks token", rf"dapi{_HEX}{{32}}(?:-\d)?"),
    _token("an API key", r"sk-(?P<body>[\w-]{22})(?![\w-])", least=LEAST_OF_THIS_LENGTH),  # LiteLLM
    _token("an API key", r"(?:sk-|gsk_|xai-|nvapi-|r8_)(?P<body>[\w-]{20,300})"),
    _token("a signed token (JWT)", r"eyJ[\w-]{10,1000}\.eyJ[\w-]{10,}\.[\w-]+"),  # bounded: tried from each eyJ on
    _shape("an authorization header", rf"(?i:bearer|authorization\W{{1,5}}basic)\s+{_VALUE}", lower=True),
    _shape(
        "the value of a secret",
        rf"(?i:(?:{_WORD}{_QUOTE}\s?[:=]|--[\w-]{{0,20}}{_WORD}\s)\s?{_QUOTE}){_VALUE}",
        lower=True,
    ),
    _shape("a signed address", r"(?:X-(?:Amz|Goog)-Signature|[?&]sig)=(?P<value>[\w%+/-]{32,})"),
    _shape("a URL with a password", _URL.pattern),
)

# Share of each letter in English text, in percent (Lewand 2000, Cryptological Mathematics, p. 36).
_SHARES: dict[str, float] = {
    **{"e": 12.7, "t": 9.1, "a": 8.2, "o": 7.5, "i": 7.0, "n": 6.7, "s": 6.3, "h": 6.1, "r": 6.0, "d": 4.3, "l": 4.0},
    **{"c": 2.8, "u": 2.8, "m": 2.4, "w": 2.4, "f": 2.2, "g": 2.0, "y": 2.0, "p": 1.9, "b": 1.5, "v": 1.0, "k": 0.8},
    **{"j": 0.15, "x": 0.15, "q": 0.1, "z": 0.07},
}


class Secret(NamedTuple):
    """A secret in a text: what kind of one, where it begins, and as much of it as may be shown."""

    what: str
    start: int
    shown: str


class _Span(NamedTuple):
    start: int
    end: int
    what: str
    refused: bool = True


def is_secret(name: str, value: str) -> bool:
    """True for an environment variable whose name says so, or whose value is a URL with a password."""
    return _NAMES.search(name.upper()) is not None or _URL.search(value) is not None


def hide(text: str) -> str:
    """The text with `***` in place of secret variables' values, of passwords in URLs and of tokens by their form."""
    kept, done = "", 0
    for span in _spans(text):
        kept += text[done : span.start] + HIDDEN
        done = span.end
    return kept + text[done:]


def secrets_in(text: str) -> Iterator[Secret]:
    """The secrets that the text holds, by their form or as the value of a secret variable."""
    for span in _spans(text):
        if span.refused:
            yield Secret(span.what, span.start, _shown(text[span.start : span.end]))


def _shown(secret: str) -> str:
    """The first and last two letters of one that is long enough, and its length."""
    first = secret[0].isalnum() and len(secret) >= 16
    return f"{secret[:2]}…{secret[-2:]}, {len(secret)} characters" if first else f"{len(secret)} characters"


def _spans(text: str) -> list[_Span]:
    """Where secrets are, in order; of those that overlap the first kind names what covers them all."""
    spans: list[_Span] = []
    for found in sorted([*_by_form(text), *_by_value(text)], key=lambda span: span.start):  # stable: kinds in order
        if spans and found.start < spans[-1].end:
            last = spans[-1]
            spans[-1] = last._replace(end=max(last.end, found.end), refused=last.refused or found.refused)
        else:
            spans.append(found)
    return spans


def _by_form(text: str) -> Iterator[_Span]:
    for shape in _SHAPES:
        for match in shape.pattern.finditer(text):
            groups = match.groupdict()
            body = groups.get("body")
            if body is None or _randomness(body, lower=shape.lower) >= shape.least:
                part = "value" if groups.get("value") is not None else 0
                yield _Span(match.start(part), match.end(part), shape.whose)


def _randomness(body: str, *, lower: bool) -> float:
    """High where rare letters are frequent and kinds of letters follow each other without order.

    Names have common letters, capitals at the beginning of words, and a separator after every word.

    Args:
        body: Letters, digits and separators.
        lower: No capitals are needed, and 32 hexadecimal digits are enough.
    """
    if lower and re.search(r"[0-9a-f]{32}", body):
        return inf
    kinds = [_kind(letter) for letter in body]
    if "lower" not in kinds or not ("upper" in kinds or (lower and "digit" in kinds)):
        return -inf
    letters = [letter for letter in body.lower() if letter in _SHARES]
    rare = -sum(log(_SHARES[letter] * 26 / 100) for letter in letters) / len(letters)
    changes = sum("" not in pair and pair[0] != pair[1] for pair in pairwise(kinds))
    words = len(re.findall(r"(?<![A-Z0-9])[A-Z](?=[a-z])", body))
    return rare + (2 * (changes - words) - 4 * kinds.count("")) / len(body)


def _kind(letter: str) -> str:
    return "lower" if letter.islower() else "upper" if letter.isupper() else "digit" if letter.isdigit() else ""


def _by_value(text: str) -> Iterator[_Span]:
    """Values of secret variables; one that is a plain word only where it stands alone, and a recipe may have it."""
    for name, value in os.environ.items():
        for part in _parts(name, value):
            if part not in text:
                continue
            plain = _PLAIN.fullmatch(part) is not None
            pattern = rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])" if plain else re.escape(part)
            for match in re.finditer(pattern, text):
                yield _Span(*match.span(), f"the value of the environment variable {name}", refused=not plain)


@lru_cache(maxsize=4096)  # asked for every line of a log: 0.2 ms of 0.6
def _parts(name: str, value: str) -> tuple[str, ...]:
    """What is secret in a variable's value: of a URL the password, as it is written and decoded."""
    url = _URL.search(value)
    if not url and (not _NAMES.search(name.upper()) or _PLACES.search(name.upper())):
        return ()
    return tuple(part for part in ((url["value"], unquote(url["value"])) if url else (value,)) if len(part) >= LEAST)
