"""Reads and judges training rows: format, malformed rows, normalisation, split. Standard library only.

`quench check --data`, `quench init` and the prepare job share it, so what passes the check passes the job.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from recipes.plain import is_list, is_mapping
from recipes.problem import Problem

Format = Literal["messages", "prompt-completion"]
Side = Literal["train", "dev", "test"]
Message = dict[str, Any]

FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN = 20  # malformed rows that are listed; the rest is counted


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training row.

    Attributes:
        where: `file.jsonl:LINE`.
        messages: Turns `{"role", "content", ...}`; the last one is the assistant's.
        columns: All other columns.
    """

    where: str
    messages: list[Message]
    columns: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a data file holds: the good rows, and what is wrong with the others.

    Attributes:
        format: None where no row has the columns of one.
        detected_from: The line that showed the format.
        rows: The good rows.
        wrong: `file.jsonl:LINE what is wrong with it`, one a malformed row.
        problems: The same as one problem, or that there are no rows.
    """

    format: Format | None
    detected_from: str
    rows: list[Row]
    wrong: list[str]
    problems: list[Problem]


class _Malformed(ValueError):
    """Says in its message why a row cannot be read."""


def jsonl_files(path: Path) -> list[Path]:
    """The file itself, or a data folder's train*.jsonl, else all its *.jsonl; sorted, empty where there is none."""
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.jsonl"))
    return [file for file in files if file.name.startswith("train")] or files


def read_rows(path: Path, *, format: str = "auto", columns: tuple[str, ...] = (), max_rows: int | None = None) -> Rows:
    """Read the rows of a JSONL file or data folder and collect all problems.

    Args:
        path: JSONL file or folder with JSONL files.
        format: `auto` (from the first row), `messages` or `prompt-completion`.
        columns: Columns that every row must have (domain, group, the scorer's).
        max_rows: Stop after so many lines that are not blank.
    """
    files = jsonl_files(path)
    if not files:
        return Rows(
            format=None, detected_from="", rows=[], wrong=[], problems=[_no_rows(path, "no *.jsonl file in it")]
        )
    detected: Format | None = next((name for name in FIELDS if name == format), None)
    first = "the recipe"
    rows: list[Row] = []
    wrong: list[str] = []
    for where, line in islice(_lines(files), max_rows):
        try:
            raw = _object(line)
            if detected is None:
                detected, first = _detect(raw), where
            rows.append(_row(raw, detected, where=where, columns=columns))
        except _Malformed as error:
            wrong.append(f"{where} {error}")
    problems = [malformed(path, wrong)] if wrong else []
    if not rows and not wrong:
        problems.append(_no_rows(path, "the file is empty"))
    return Rows(format=detected, detected_from=first, rows=rows, wrong=wrong, problems=problems)


def normalised(messages: list[Message]) -> str:
    """Canonical JSON of the turns: NFC, runs of white space one space, ends stripped. Two rows with one are equal."""
    turns = [{key: _plain(value) for key, value in turn.items()} for turn in messages]
    return json.dumps(turns, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def content_hash(messages: list[Message]) -> str:
    """sha256 (hex) of the normalised turns; its first 16 digits name the row."""
    return hashlib.sha256(normalised(messages).encode()).hexdigest()


def side(group: str, *, salt: str, dev: float, test: float) -> Side:
    """The side of the split that a group is on: a pure function of group and salt, whatever other rows exist."""
    share = int.from_bytes(hashlib.sha256(f"{salt}:{group}".encode()).digest()[:8], "big") / 2**64
    if share < test:
        return "test"
    return "dev" if share < test + dev else "train"


def _plain(value: object) -> object:
    return " ".join(unicodedata.normalize("NFC", value).split()) if isinstance(value, str) else value


def _lines(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """(`file:LINE`, bytes) of every line that is not blank."""
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file.name}:{number}", line


def _object(line: bytes) -> dict[str, Any]:
    try:
        raw: object = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _Malformed(f"is not JSON ({error})") from None
    if not is_mapping(raw):
        raise _Malformed(f"is a JSON {type(raw).__name__}, not an object")
    return raw


def _detect(raw: dict[str, Any]) -> Format:
    for name, fields in FIELDS.items():
        if all(field in raw for field in fields):
            return name
    raise _Malformed(f"has the columns {sorted(raw)}; needed are `messages`, or `prompt` and `completion`")


def _row(raw: dict[str, Any], format: Format, *, where: str, columns: tuple[str, ...]) -> Row:
    fields = FIELDS[format]
    for name in (*fields, *columns):
        if raw.get(name) is None:
            raise _Malformed(f"has no `{name}`")
    if format == "messages":
        messages = raw["messages"]
    else:
        messages = [
            {"role": "user", "content": raw["prompt"]},
            {"role": "assistant", "content": raw["completion"]},
        ]
    _check_messages(messages)
    others = {name: value for name, value in raw.items() if name not in fields}
    return Row(where=where, messages=messages, columns=others)


def _check_messages(messages: object) -> None:
    """Raise _Malformed unless these are turns with known roles and text, the last one the assistant's."""
    if not is_list(messages) or not messages:
        raise _Malformed("has no list of turns")
    for number, turn in enumerate(messages, start=1):
        if not is_mapping(turn) or turn.get("role") not in ROLES:
            raise _Malformed(f"turn {number} has no role out of {', '.join(ROLES)}")
        calls = turn["role"] == "assistant" and bool(turn.get("tool_calls"))
        content = "" if calls and turn.get("content") is None else turn.get("content")
        if not isinstance(content, str):
            raise _Malformed(f"turn {number} has no text as content")
        if turn["role"] == "assistant" and not content.strip() and not calls:
            raise _Malformed(f"turn {number} is an empty assistant turn")
        if not _is_unicode(content):
            raise _Malformed(f"turn {number} holds half of a surrogate pair, which no tokenizer reads")
    if messages[-1]["role"] != "assistant":
        raise _Malformed("does not end with an assistant turn, so its last turn has no answer")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def malformed(path: Path, wrong: list[str]) -> Problem:
    """Malformed rows as one problem: the first 20 by name, the rest counted."""
    more = f"\n    and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return Problem(
        what=f"{len(wrong)} malformed row(s)",
        where=wrong[0].split(" ", 1)[0],
        why="these rows cannot be read:\n    " + "\n    ".join(wrong[:SHOWN]) + more,
        next=f"correct or remove them in {path}",
    )


def _no_rows(path: Path, why: str) -> Problem:
    return Problem(
        what="no training rows",
        where=str(path),
        why=why,
        next='give data.path a JSONL file with rows {"messages": [...]} or {"prompt": ..., "completion": ...}',
    )
