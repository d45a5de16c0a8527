r"""Which columns of a row are its turns: formats, `data.columns`, `data.keep`, and refusals with the line to write.

Five formats are known by their columns. Other columns are named in `data.columns`, which gives a column one of the
names below, or puts a text together from several: `prompt: "{instruction}\n\n{context}"`.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any, Literal, NamedTuple

from recipes.data.files import Unread
from recipes.data.raw.strict import parse
from recipes.data.tools import Tool, tools_of
from recipes.data.turns import MEDIA, Message, check_turns, turns_of
from recipes.plain import NOT_JSON, is_list, is_mapping
from recipes.problem import Problem

Format = Literal["messages", "prompt-completion", "sharegpt", "alpaca", "text"]
# What data.columns can name: the columns of the formats, and what every format may have.
Target = Literal[
    "messages", "prompt", "completion", "conversations", "instruction", "input", "output", "history", "text",
    "system", "tools", "group", "domain",
]  # fmt: skip
Keep = bool | int | float | str | None

# Columns that a row of a format has, in the order in which formats are looked for; and those that it may have.
FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "prompt-completion": ("history", "system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "history", "system", "tools"),
    "text": (),
}
TEXT = "text"  # role of the one turn of a plain text: no template renders it, and every token is trained
REJECTED = ("rejected", "rejected_response", "rejected_messages")  # what a model should not say
LABELS = ("label", "kto_tag")  # whether an answer is a good one, in unpaired preference data
# Names that the field uses for a question, what is given with it, and the answer; `init` proposes them.
QUESTIONS = ("question", "query", "instruction", "input", "user", "article", "document", "source", "src", "problem")
GIVEN = ("context", "passage", "background")
ANSWERS = (
    "answer", "response", "output", "target", "summary", "highlights", "assistant", "reply", "completion", "solution",
    "label_text", "tgt",
)  # fmt: skip
TEXTS = ("content", "body", "document")
SYSTEMS = ("system", "system_prompt", "system_message")
EXAMPLE_CHARS = 60


class Turns(NamedTuple):
    """The turns of a row, and its tools."""

    turns: list[Message]
    tools: list[Tool] | None


class NoFormat(Unread):
    """The rows of a source cannot be used as they are; holds the one problem that says so."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.what)


def detect(raw: Mapping[str, Any], *, mapped: Sequence[str], where: str, absent: Sequence[str] = ()) -> Format:
    """The format of a row by its columns; those that data.columns names come first.

    Args:
        raw: The row, under the names that data.columns gives.
        mapped: These names.
        absent: Columns that data.columns takes and the row does not have.
        where: Place of the row.

    Raises:
        NoFormat: No format has these columns; the problem names a line that would do.
    """
    for columns in (mapped, raw):
        for name, fields in FIELDS.items():
            if all(column in raw for column in fields) and any(column in columns for column in fields):
                return name
    if absent:
        near = [name for column in absent for name in get_close_matches(column, list(raw), n=1)]
        raise NoFormat(
            Problem(
                what=f"The row has no column {', '.join(absent)}.",
                where=where,
                why=f"data.columns names it. The row has {_examples(raw)}.",
                next=f"Did you mean {', '.join(near)}?" if near else "Correct data.columns.",
            )
        )
    known = "; ".join(f"{' and '.join(f'`{column}`' for column in fields)} ({name})" for name, fields in FIELDS.items())
    proposal = propose(raw)
    line = columns_line(proposal) if proposal else "columns: {prompt: COLUMN, completion: COLUMN}"
    raise NoFormat(
        Problem(
            what="The columns of these rows are no format that is known by its names.",
            where=where,
            why=f"The row has {_examples(raw)}. Known are {known}.",
            next=("" if proposal else "With the names of your columns: ") + _to_write(line),
        )
    )


def refuse_preferences(raw: Mapping[str, Any], *, mapped: Sequence[str], named: Sequence[str], where: str) -> None:
    """Raise NoFormat for rows that hold answers which a model should not give, unless the recipe says what it takes.

    Args:
        raw: The row as it is in the file.
        mapped: Names that data.columns gives.
        named: Columns that the recipe names (keep, domain, group, scorers).
        where: Place of the row.
    """
    rejected = next((name for name in REJECTED if raw.get(name)), None)
    if rejected is not None and not any(name in mapped for name in chain.from_iterable(FIELDS.values())):
        raise NoFormat(
            Problem(
                what="These are preference pairs: an answer that is wanted beside one that is not.",
                where=where,
                why=f"`{rejected}` would be left out in silence, and nothing says which of the two is to be trained. "
                f"The row has {_examples(raw)}.",
                next=f"To train on the wanted answers: {_to_write(_chosen_line(raw))}",
            )
        )
    label = next((name for name in LABELS if name not in named and _is_yes_or_no(raw.get(name))), None)
    if label is not None and any(
        name in (*raw, *mapped) for name in ("messages", "conversations", "prompt", "instruction")
    ):
        raise NoFormat(
            Problem(
                what="These are answers with a verdict on each: some are wanted, some are not.",
                where=where,
                why=f"Its `{label}` is {json.dumps(raw[label])}: all answers would be trained, the bad ones too.",
                next=f"To train on the wanted answers alone: {_to_write(f'keep: {{{label}: true}}')} If it is no "
                f"verdict, name it as the domain: `domain: {label}`.",
            )
        )


def named_columns(raw: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The row with the columns that data.columns asks for, under the names that it gives; None and "" are left out.

    A column that is taken as it is no longer stands under its old name.
    """
    if not columns:
        return dict(raw)
    taken = {source for _, source in columns if not is_template(source)}
    values = {target: filled(source, raw) if is_template(source) else raw.get(source) for target, source in columns}
    targets = {target for target, _ in columns}
    rest = {name: value for name, value in raw.items() if name not in taken and name not in targets}
    return rest | {target: value for target, value in values.items() if value not in (None, "")}


def is_template(source: str) -> bool:
    """A value of data.columns with braces is put together from columns; else it is the name of one."""
    return "{" in source


def parts_of(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the column behind it, None behind the last text.

    Raises:
        ValueError: Braces do not match, or hold more than a name.
    """
    parts: list[tuple[str, str | None]] = []
    for literal, column, spec, conversion in string.Formatter().parse(template):
        if column == "" or spec or conversion:
            raise ValueError("braces hold the name of a column and nothing else; {{ is a brace")
        parts.append((literal, column))
    return parts


def filled(template: str, raw: Mapping[str, Any]) -> str:
    """The text of a template. An empty column goes with the text before it, so that it leaves no gap.

    Raises:
        Unread: A column holds something else than text or a number.
    """
    text = ""
    for literal, column in parts_of(template):
        if column is None:
            text += literal
            continue
        value = raw.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise Unread(f"has no text as `{column}`")
        if value is not None and str(value).strip():
            text += (literal if text else literal.lstrip("\n")) + str(value)
    return text.strip("\n")


def columns_of(columns: Iterable[tuple[str, str]]) -> list[str]:
    """Columns of the file that data.columns reads."""
    named = (
        [column for _, column in parts_of(source) if column] if is_template(source) else [source]
        for _, source in columns
    )
    return list(dict.fromkeys(chain.from_iterable(named)))


def is_kept(raw: Mapping[str, Any], keep: Sequence[tuple[str, tuple[Keep, ...]]]) -> bool:
    """Whether every column that data.keep names has one of its values."""
    return all(any(_equal(raw.get(column), value) for value in values) for column, values in keep)


def turns_in(raw: Mapping[str, Any], format: Format, *, drop_reasoning: bool) -> Turns:
    """The turns and the tools of a row.

    Raises:
        Unread: They cannot be read, or there is nothing to train on.
    """
    for name in MEDIA:
        if raw.get(name):
            raise Unread(f"has `{name}`; only text is trained (`keep: {{{name}: null}}` leaves such rows out)")
    if format == "text":
        if not isinstance(raw["text"], str) or not raw["text"].strip():
            raise Unread("has no text as `text`")
        return Turns([{"role": TEXT, "content": raw["text"]}], None)
    tools = tools_of(raw.get("tools") or raw.get("functions"))  # `functions`: OpenAI's first form
    turns = _turns_of_format(raw, format, tools, drop_reasoning=drop_reasoning)
    turns = _with_system(turns, raw.get("system"))
    check_turns(turns)
    return Turns(turns, tools)


def propose(raw: Mapping[str, Any]) -> dict[str, str] | None:
    """What data.columns could be for a row with columns that the field uses; None where nothing fits."""
    by_name = {name.lower().strip(): name for name in raw}

    def first(names: Sequence[str], but: Sequence[str] = ()) -> str | None:
        return next((by_name[name] for name in names if name in by_name and by_name[name] not in but), None)

    question = first(QUESTIONS)
    answer = first(ANSWERS, but=[question or ""])
    if question is None or answer is None:
        text = first(TEXTS)
        return {"text": text} if text and answer is None and isinstance(raw[text], str) else None
    if not all(isinstance(raw[name], str | int | float) for name in (question, answer)):
        return None
    given = first(GIVEN, but=[question, answer])
    prompt = f"{{{question}}}\n\n{{{given}}}" if given else question
    system = first(SYSTEMS, but=[question, answer])
    return {"prompt": prompt, "completion": answer} | ({"system": system} if system else {})


def columns_line(columns: Mapping[Any, str]) -> str:
    """`columns: {prompt: question, completion: answer}`, as it is written in a recipe."""
    parts = (f"{name}: {_yaml(value)}" for name, value in columns.items())
    return f"columns: {{{', '.join(parts)}}}"


def _to_write(line: str) -> str:
    """Where a line goes in a recipe, and how `quench init` is told the same."""
    name, _, value = line.partition(": ")
    return f"write `{line}` under `data:` in the recipe; with quench init, add --set 'data.{name}={value}'."


def _yaml(value: str) -> str:
    return value if value.replace("_", "").isalnum() and not value.isdigit() else json.dumps(value, ensure_ascii=False)


def _turns_of_format(
    raw: Mapping[str, Any], format: Format, tools: list[Tool] | None, *, drop_reasoning: bool
) -> list[Message]:
    def read(value: Any) -> list[Message]:
        return turns_of(value, tools, drop_reasoning=drop_reasoning)

    if format in ("messages", "sharegpt"):
        return read(raw["messages" if format == "messages" else "conversations"])
    if format == "prompt-completion":
        asked = [
            turn | {"train": False} if turn["role"] == "assistant" else turn
            for turn in read(_as_turns(raw["prompt"], role="user"))
        ]
        earlier = read(turns) if (turns := _history(raw.get("history"))) else []
        return [*earlier, *asked, *read(_as_turns(raw["completion"], role="assistant"))]
    instruction, more = raw["instruction"], raw.get("input") or ""
    for name, value in (("instruction", instruction), ("input", more)):
        if not isinstance(value, str):
            raise Unread(f"has no text as `{name}`")
    prompt = f"{instruction}\n\n{more}" if more.strip() else instruction
    pair = [{"role": "user", "content": prompt}, {"role": "assistant", "content": raw["output"]}]
    return read([*_history(raw.get("history")), *pair])


def _as_turns(value: Any, *, role: str) -> Any:
    """A text as one turn of this role; a turn alone as a list of one; a list is one of turns already.

    The JSON text of a list of turns is one, too; that of another list is a text: an answer may be JSON.
    """
    if isinstance(value, str) and not _holds_turns(value):
        return [{"role": role, "content": value}]
    if is_mapping(value):
        return [value]
    return value


def _holds_turns(text: str) -> bool:
    if not text.lstrip().startswith("[{"):
        return False
    try:
        turns: object = json.loads(text)
    except NOT_JSON:
        return False
    return is_list(turns) and all(is_mapping(turn) and ("role" in turn or "from" in turn) for turn in turns)


def _history(value: Any) -> list[Message]:
    """Earlier exchanges of a row: [[question, answer], ...]. Their answers are trained, too."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse(value)
        except Unread as error:
            raise Unread(f"has a `history` that is not JSON: its text {error}") from None
    turns: list[Message] = []
    for number, pair in enumerate(value or [], start=1):
        if not is_list(pair) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Unread(f"exchange {number} of its `history` is no pair of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _with_system(turns: list[Message], system: Any) -> list[Message]:
    """The turns behind the text of a `system` column."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return turns
    if not isinstance(system, str):
        raise Unread("has no text as `system`")
    first = turns[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *turns]
    if first["content"].strip() != system.strip():
        raise Unread("has a `system` column and a system turn with another text; one of them has to go")
    return turns


def _chosen_line(raw: Mapping[str, Any]) -> str:
    """The line that makes rows to train on of preference pairs."""
    if "chosen" not in raw:  # ms-swift: the messages hold the wanted answer
        kept = next(
            (name for name in ("messages", "conversations", "completion", "response") if name in raw), "messages"
        )
        if kept in ("completion", "response") and "prompt" in raw:
            return columns_line({"prompt": "prompt", "completion": kept})
        return columns_line({kept: kept})
    chosen = raw["chosen"]
    before = next((name for name in ("prompt", "conversations", "question", "instruction") if raw.get(name)), None)
    if (is_list(chosen) and len(chosen) > 1) or before is None:
        return columns_line({"messages": "chosen"})
    if before == "prompt":
        return columns_line({"completion": "chosen"})
    return columns_line({"prompt": before, "completion": "chosen"})


def _is_yes_or_no(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1))


def _equal(value: object, wanted: Keep) -> bool:
    """Whether a cell has a value of the recipe; in CSV all cells are text."""
    if wanted is None or value is None:
        return value in (None, "", []) and wanted in (None, "")
    if isinstance(wanted, bool):
        said = value.strip().lower() if isinstance(value, str) else value
        return said in ((True, 1, "true", "1") if wanted else (False, 0, "false", "0"))
    if isinstance(value, bool):
        return False
    return value == wanted or (isinstance(value, str) and value.strip() == str(wanted))


def _examples(raw: Mapping[str, Any]) -> str:
    """Columns of a row with the beginning of their values."""
    cells: list[str] = []
    for name, value in raw.items():
        text = json.dumps(value, ensure_ascii=False, default=str)
        cells.append(f"`{name}`: {text if len(text) <= EXAMPLE_CHARS else text[:EXAMPLE_CHARS] + '...'}")
    return ", ".join(cells) or "no columns"
