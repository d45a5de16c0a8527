"""What is a secret, and text without it. Standard library only: everything else may import this.

Tokens come from the environment or from Prefect's secret blocks, never from a recipe. `hide` is applied wherever text
from outside is kept or shown: problems, lines of a run's log, what MLflow answers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from urllib.parse import unquote

HIDDEN = "***"
LEAST = 8  # characters of a variable's value that is hidden in running text: `test` would be hidden in every word of it

_NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|(?:^|_)AUTH(?:_|$)"
)
# scheme://user:password@; what stands for a password (PASSWORD, $VAR, ***) is none.
# The scheme has an end, here and in a signed token: a word of 100,000 letters would be tried from each of them on.
_URL = re.compile(
    r"(?P<before>[A-Za-z][\w+.-]{0,30}://[^\s/:@'\"]*:)(?P<password>(?!PASSWORD@|[$<{*])[^\s/@'\"]+)(?=@)"
)
_TOKENS = {  # by whose it is
    "a Hugging Face token": r"hf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}",
    "a GitLab token": r"glpat-[\w-]{20,}",
    "a Prefect API key": r"pn[ub]_[A-Za-z0-9]{30,}",
    "an AWS key id": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "a Google API key": r"AIza[\w-]{35}",
    "a Slack token": r"xox[abeprs]-[\w-]{10,}",
    "an API key": r"sk-[\w-]{20,}",
    "a signed token (JWT)": r"eyJ[\w-]{10,1000}\.eyJ[\w-]{10,}\.[\w-]+",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*",
}
_TOKEN = re.compile("|".join(rf"(?<![A-Za-z0-9])(?:{pattern})" for pattern in _TOKENS.values()))


def is_secret(name: str, value: str) -> bool:
    """True for an environment variable whose name says so, or whose value is a URL with a password."""
    return _NAMES.search(name.upper()) is not None or _URL.search(value) is not None


def hide(text: str) -> str:
    """The text with `***` in place of secret variables' values, of passwords in URLs and of tokens by their form."""
    return hide_all([text])[0]


def hide_all(texts: Iterable[str]) -> list[str]:
    """The same of several texts; the environment is looked through once."""
    values = sorted(_values(), key=len, reverse=True)
    return [_hidden(text, values) for text in texts]


def _hidden(text: str, values: Iterable[str]) -> str:
    for value in values:
        text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, _URL.sub(rf"\g<before>{HIDDEN}", text))


def secrets_in(text: str) -> Iterator[str]:
    """What kinds of secrets the text holds, by their form or as the value of a secret variable; never their values."""
    for whose, pattern in _TOKENS.items():
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})", text):
            yield whose
    if _URL.search(text):
        yield "a URL with a password"
    for name, value in os.environ.items():
        if is_secret(name, value) and any(part in text for part in _parts(value)):
            yield f"the value of the environment variable {name}"


def _values() -> set[str]:
    return _values_of(tuple(os.environ.items()))


@lru_cache(maxsize=1)  # asked for each part of each problem
def _values_of(variables: tuple[tuple[str, str], ...]) -> set[str]:
    return {part for name, value in variables if is_secret(name, value) for part in _parts(value)}


def _parts(value: str) -> Iterator[str]:
    """What is secret in a secret variable's value: of a URL the password, as it is written and decoded."""
    url = _URL.search(value)
    for part in (url["password"], unquote(url["password"])) if url else (value,):
        if len(part) >= LEAST:
            yield part
