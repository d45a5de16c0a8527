"""A YAML file as values and the line of every field. Standard library and yaml only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import yaml

from recipes.plain import is_mapping
from recipes.problem import Problem
from recipes.read.secrets import secret_problems

_EXPONENT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"))


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as the number it is (YAML 1.1 asks for 2.0e-4), and dates as text."""

    yaml_implicit_resolvers: ClassVar = {  # pyright: ignore[reportIncompatibleVariableOverride]
        first: [*((tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"), _EXPONENT]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Document(NamedTuple):
    """One file: its text, its values, and `file:line` of each field by dotted name."""

    text: str
    values: dict[str, Any]
    places: dict[str, str]


def parse(path: Path, *, shown: str, problems: list[Problem], wanted_by: str = "") -> Document | None:
    """The file as a Document, or None with the reasons appended to `problems`.

    Args:
        path: YAML file.
        shown: The path as messages show it.
        problems: Grows by what is wrong.
        wanted_by: Where the file is named, when that is another file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(_unreadable(path, shown=shown, error=error, wanted_by=wanted_by))
        return None
    problems += secret_problems(text, shown=shown)
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader))  # pyright: ignore[reportUnknownMemberType]
        values: object = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        problems.append(_syntax(error, shown=shown))
        return None
    except yaml.YAMLError as error:
        problems.append(_not_a_recipe(shown, f"it cannot be read as YAML ({str(error).splitlines()[0]})"))
        return None
    if not isinstance(node, yaml.MappingNode) or not is_mapping(values):
        problems.append(_not_a_recipe(shown, "it is empty" if node is None else "it does not hold `key: value` lines"))
        return None
    places: dict[str, str] = {}
    for name, line, repeated in _fields(node, prefix=""):
        if repeated:
            problems.append(_twice(name, first=places[name], again=f"{shown}:{line}"))
        places[name] = f"{shown}:{line}"
    return Document(text, values, places)


def parse_value(text: str) -> object:
    """One YAML value, as `--set` takes it. Raises yaml.YAMLError."""
    return yaml.load(text, Loader)


class _Field(NamedTuple):
    name: str
    line: int
    repeated: bool


def _fields(node: yaml.Node, *, prefix: str) -> Iterator[_Field]:
    """Every field below a node, depth first; a key that stands twice in one mapping is marked."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield _Field(name, key.start_mark.line + 1, name in seen)
            seen.add(name)
            yield from _fields(value, prefix=f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield _Field(f"{prefix}{index}", value.start_mark.line + 1, False)
            yield from _fields(value, prefix=f"{prefix}{index}.")


def _unreadable(path: Path, *, shown: str, error: OSError | UnicodeDecodeError, wanted_by: str) -> Problem:
    near: list[str] = []
    if path.parent.is_dir():
        near = get_close_matches(path.name, [file.name for file in path.parent.iterdir() if file.is_file()], n=1)
    reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else (error.strerror or "it cannot be read")
    remedy = f"Did you mean {path.parent / near[0]}?" if near else "Check the path, or write one with `quench init`."
    return Problem(what=f"The recipe {shown} cannot be read.", where=wanted_by or shown, why=f"{reason}.", next=remedy)


def _syntax(error: yaml.MarkedYAMLError, *, shown: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{shown}:{mark.line + 1}" if mark else shown
    column = f", column {mark.column + 1}" if mark else ""
    return Problem(
        what="The recipe is not YAML.",
        where=where,
        why=f"{error.problem or error.context}{column}.",
        next="Look at this line and the one before: indentation by spaces, a space after each colon, closed quotes.",
    )


def _not_a_recipe(shown: str, why: str) -> Problem:
    return Problem(
        what=f"{shown} is not a recipe.",
        where=f"{shown}:1",
        why=f"{why[0].upper()}{why[1:]}.",
        next="Write name, model and data at least; `quench init` writes a commented recipe.",
    )


def _twice(name: str, *, first: str, again: str) -> Problem:
    return Problem(
        what=f"`{name}` stands twice.",
        where=f"{again} {name}",
        why=f"YAML would silently keep the last; the first is at {first}.",
        next="Remove one of the two.",
    )
