"""Reads and judges training rows: format, malformed rows, normalisation, split, draw. Standard library only.

`quench check --data`, `quench init` and the prepare job share it, so what passes the check passes the job.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from recipes.data.files import Unread, data_files, raw_rows
from recipes.plain import is_list, is_mapping
from recipes.problem import Problem

Format = Literal["messages", "prompt-completion", "sharegpt", "alpaca", "text"]
Side = Literal["train", "dev", "test"]
Message = dict[str, Any]

# Columns that a row of a format has, in the order in which formats are looked for; and those that it may have.
FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {"sharegpt": ("system",), "alpaca": ("input", "system")}
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT = "text"  # role of the one turn of a plain text: no template renders it, and every token is trained
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
SHOWN = 20  # malformed rows that are listed; the rest is counted


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One source of rows, as files on this machine.

    Attributes:
        path: File or folder.
        format: `auto`, or a format.
        columns: Columns that every row must have beside its turns.
        weight: Share of its train rows that is kept.
        domain: Domain of all its rows; None where a column says it.
        inside: Prefix of file names in messages, to tell sources apart.
    """

    path: Path
    format: str = "auto"
    columns: tuple[str, ...] = ()
    weight: float = 1.0
    domain: str | None = None
    inside: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training row.

    Attributes:
        where: `file.jsonl:LINE`, or `file.parquet#ROW`.
        messages: Turns `{"role", "content", ...}`, the last one the assistant's; of a plain text its one turn.
        columns: All other columns.
        origin: Where it was read from.
    """

    where: str
    messages: list[Message]
    columns: dict[str, Any]
    origin: Origin

    @property
    def is_text(self) -> bool:
        """A plain text: no prompt, no template."""
        return self.messages[0]["role"] == TEXT

    def domain(self, column: str | None) -> str:
        """The source's domain, else the value of a column, else nothing."""
        if self.origin.domain is not None:
            return self.origin.domain
        return str(self.columns[column]) if column else ""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a source holds: the good rows, and what is wrong with the others.

    Attributes:
        format: None where no row has the columns of one.
        detected_from: The place of the row that showed the format.
        rows: The good rows.
        wrong: `file.jsonl:LINE what is wrong with it`, one per malformed row.
        problems: The same as one problem, or that there are no rows.
    """

    format: Format | None = None
    detected_from: str = ""
    rows: list[Row] = field(default_factory=list[Row])
    wrong: list[str] = field(default_factory=list[str])
    problems: list[Problem] = field(default_factory=list[Problem])


def origins(
    paths: Sequence[Path], sources: Sequence[Mapping[str, Any]], *, domain: str | None, columns: Sequence[str | None]
) -> list[Origin]:
    """Sources of a recipe with the paths that they have here.

    Args:
        paths: One per source.
        sources: `format`, `weight` and `domain` of each.
        domain: Column of the domain; a source with a domain of its own need not have it.
        columns: Other columns that every row must have.
    """
    return [
        Origin(
            path=path,
            format=source["format"],
            columns=tuple(dict.fromkeys(name for name in (source["domain"] is None and domain, *columns) if name)),
            weight=source["weight"],
            domain=source["domain"],
            inside=f"{path.name if path.is_dir() else path.parent.name}/" if len(paths) > 1 else "",
        )
        for path, source in zip(paths, sources, strict=True)
    ]


def source_name(number: int) -> str:
    """Name of a source as an input of prepare: data, data-1, data-2 ..."""
    return f"data-{number}" if number else "data"


def read_rows(path: Path, *, format: str = "auto", columns: tuple[str, ...] = (), max_rows: int | None = None) -> Rows:
    """`read_origin` of a path alone."""
    return read_origin(Origin(path=path, format=format, columns=columns), max_rows=max_rows)


def read_origin(origin: Origin, *, max_rows: int | None = None) -> Rows:
    """Read the rows of a source and collect all problems.

    Args:
        origin: The source; with the format `auto` its first readable row shows the format.
        max_rows: Stop after so many rows.
    """
    path = origin.path
    if not data_files(path):
        return Rows(problems=[_no_rows(path, "no *.jsonl, *.json, *.csv or *.parquet file in it")])
    detected: Format | None = next((name for name in FIELDS if name == origin.format), None)
    first = "the recipe"
    rows: list[Row] = []
    wrong: list[str] = []
    for where, raw, unread in islice(raw_rows(path, inside=origin.inside), max_rows):
        try:
            if raw is None:
                raise Unread(unread)
            if detected is None:
                detected, first = _detect(raw), where
            rows.append(_row(raw, detected, where=where, origin=origin))
        except Unread as error:
            wrong.append(f"{where} {error}")
    problems = [malformed([path], wrong)] if wrong else []
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


def drawn(row: str, *, weight: float, salt: str) -> bool:
    """Whether a train row of a source with this weight is kept: a pure function of its name, whatever other rows exist.

    A row that is kept stays kept when the weight or the source grows.
    """
    share = int.from_bytes(hashlib.sha256(f"{salt}:weight:{row}".encode()).digest()[:8], "big") / 2**64
    return share < weight


def _plain(value: object) -> object:
    return " ".join(unicodedata.normalize("NFC", value).split()) if isinstance(value, str) else value


def _detect(raw: dict[str, Any]) -> Format:
    for name, fields in FIELDS.items():
        if all(column in raw for column in fields):
            return name
    known = "; ".join(f"{' and '.join(f'`{column}`' for column in fields)} ({name})" for name, fields in FIELDS.items())
    raise Unread(f"has the columns {sorted(raw)}; needed are {known}")


def _row(raw: dict[str, Any], format: Format, *, where: str, origin: Origin) -> Row:
    fields = FIELDS[format]
    for name in (*fields, *origin.columns):
        if raw.get(name) is None:
            raise Unread(f"has no `{name}`")
    messages = _messages(raw, format)
    (_check_text if format == "text" else _check_messages)(messages)
    own = (*fields, *OPTIONAL.get(format, ()))
    others = {name: value for name, value in raw.items() if name not in own or name in origin.columns}
    return Row(where=where, messages=messages, columns=others, origin=origin)


def _messages(raw: dict[str, Any], format: Format) -> list[Message]:
    """The turns of a row; what they hold is checked later."""
    if format == "messages":
        return _listed(raw["messages"])
    if format == "text":
        return [{"role": TEXT, "content": raw["text"]}]
    if format == "prompt-completion":
        return [*_prompt(raw["prompt"]), *_turns(raw["completion"], role="assistant")]
    system: list[Message] = [{"role": "system", "content": raw["system"]}] if raw.get("system") else []
    if format == "sharegpt":
        return system + [_spoken(turn, number) for number, turn in enumerate(_listed(raw["conversations"]), start=1)]
    instruction, more = raw["instruction"], raw.get("input") or ""
    for name, value in (("instruction", instruction), ("input", more)):
        if not isinstance(value, str):
            raise Unread(f"has no text as `{name}`")
    prompt = f"{instruction}\n\n{more}" if more.strip() else instruction
    return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": raw["output"]}]


def _turns(value: Any, *, role: str) -> list[Message]:
    """A text as one turn of this role; a list is one of turns already."""
    return value if is_list(value) else [{"role": role, "content": value}]


def _prompt(value: Any) -> list[Message]:
    """The prompt's turns. None is the assistant's: every assistant turn is trained, and a prompt is not."""
    turns = _turns(value, role="user")
    if any(is_mapping(turn) and turn.get("role") == "assistant" for turn in turns):
        raise Unread(
            "has an assistant turn in its `prompt`: write `messages`; every assistant turn of these is trained"
        )
    return turns


def _listed(value: Any) -> list[Message]:
    """A list of turns; as JSON text where a cell can hold nothing else (CSV)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Unread(f"has turns that are not JSON ({error})") from None
    if not is_list(value) or not value:
        raise Unread("has no list of turns")
    return value


def _spoken(turn: Any, number: int) -> Message:
    """A turn `{"from", "value"}` as `{"role", "content"}`."""
    if not is_mapping(turn) or "from" not in turn:
        return turn
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise Unread(f"turn {number} is from {speaker!r}; known are {', '.join(SPEAKERS)}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": SPEAKERS[speaker], "content": turn.get("value"), **rest}


def _check_text(messages: list[Message]) -> None:
    text = messages[0]["content"]
    if not isinstance(text, str) or not text.strip():
        raise Unread("has no text as `text`")
    if not _is_unicode(text):
        raise Unread("holds half of a surrogate pair, which no tokenizer reads")


def _check_messages(messages: list[Message]) -> None:
    """Raise Unread unless these are turns with known roles and text, the last one the assistant's."""
    if not messages:
        raise Unread("has no list of turns")
    for number, turn in enumerate(messages, start=1):
        if not is_mapping(turn) or turn.get("role") not in ROLES:
            raise Unread(f"turn {number} has no role out of {', '.join(ROLES)}")
        calls = turn["role"] == "assistant" and bool(turn.get("tool_calls"))
        content = "" if calls and turn.get("content") is None else turn.get("content")
        if not isinstance(content, str):
            raise Unread(f"turn {number} has no text as content")
        if turn["role"] == "assistant" and not content.strip() and not calls:
            raise Unread(f"turn {number} is an empty assistant turn")
        if not _is_unicode(content):
            raise Unread(f"turn {number} holds half of a surrogate pair, which no tokenizer reads")
    if messages[-1]["role"] != "assistant":
        raise Unread("does not end with an assistant turn, so its last turn has no answer")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def malformed(paths: Sequence[Path], wrong: list[str]) -> Problem:
    """Malformed rows as one problem."""
    return Problem(
        what=f"{len(wrong)} malformed row(s)",
        where=wrong[0].split(" ", 1)[0],
        why=f"these rows cannot be read:{first_lines(wrong)}",
        next=f"correct or remove them in {', '.join(map(str, paths))}",
    )


def first_lines(rows: Sequence[str]) -> str:
    """The first 20 rows by name, one per line, and how many more there are."""
    more = [f"and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return "".join(f"\n    {line}" for line in (*rows[:SHOWN], *more))


def _no_rows(path: Path, why: str) -> Problem:
    return Problem(
        what="no training rows",
        where=str(path),
        why=why,
        next='give data.path a file with rows {"messages": [...]} or {"prompt": ..., "completion": ...}; '
        "docs/recipe.md names the other formats",
    )
