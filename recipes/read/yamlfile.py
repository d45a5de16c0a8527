"""A YAML file as values and the line of every field."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from recipes.plain import is_mapping
from recipes.plain_yaml import Loader
from recipes.problem import Problem, RecipeError, shown
from recipes.read.secrets import secret_problems

MOST_CHARS = 1 << 17  # of a file: PyYAML takes a second and more for 20,000 numbers


class RecipeFile(NamedTuple):
    """One file: its text, its values, `file:line` of each field by dotted name, and what else is wrong with it."""

    text: str
    values: dict[str, Any]
    places: dict[str, str]
    problems: list[Problem]


def parse(path: Path, *, wanted_by: str = "") -> RecipeFile:
    """Read a file; secrets and repeated keys in it are among its problems.

    Args:
        path: YAML file.
        wanted_by: Where the file is named, when that is another file.

    Raises:
        RecipeError: It cannot be read, or holds no mapping.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark, as editors of Windows write it
            text = file.read(MOST_CHARS + 1)  # of a device, or a file of rows, not all
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error=error, wanted_by=wanted_by).error() from None
    name = shown(path)
    if len(text) > MOST_CHARS:
        raise _not_a_recipe(name, f"it has more than {MOST_CHARS:,} characters, and a recipe some thousand").error()
    secrets = partial(secret_problems, text, file=name)
    try:
        loader = Loader(text)
        node = cast("yaml.Node | None", loader.get_single_node())
        values = loader.document(node)
    except yaml.MarkedYAMLError as error:
        raise RecipeError([*secrets(keys={}), _syntax(error, file=name)]) from None
    except yaml.YAMLError as error:
        why = f"it cannot be read as YAML ({str(error).splitlines()[0]})"
        raise RecipeError([*secrets(keys={}), _not_a_recipe(name, why)]) from None
    if not isinstance(node, yaml.MappingNode) or not is_mapping(values):
        why = "it is empty" if node is None else "it does not hold `key: value` lines"
        raise RecipeError([*secrets(keys={}), _not_a_recipe(name, why)])
    places: dict[str, str] = {}
    fields = list(_fields(node, prefix=""))
    problems = list(secrets(keys={field.line: field.name for field in fields}))
    for field in fields:
        place = f"{name}:{field.line}"
        if field.repeated:
            problems.append(_twice(field.name, first=places[field.name], again=place))
        places[field.name] = place
    return RecipeFile(text, values, places, problems)


def parse_value(text: str) -> object:
    """One YAML value, as `--set` takes it. Raises yaml.YAMLError."""
    return yaml.load(text, Loader)


class _Field(NamedTuple):
    name: str
    line: int
    repeated: bool


def _fields(node: yaml.Node, *, prefix: str) -> Iterator[_Field]:
    """Every field below a node, depth first; a key that its mapping repeats is marked."""
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


def _unreadable(path: Path, *, error: OSError | UnicodeDecodeError, wanted_by: str) -> Problem:
    near: list[str] = []
    if path.parent.is_dir():
        near = get_close_matches(path.name, [file.name for file in path.parent.iterdir() if file.is_file()], n=1)
    reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else (error.strerror or "it cannot be read")
    remedy = f"Did you mean {path.parent / near[0]}?" if near else "Check the path, or write one with `quench init`."
    name = shown(path)
    return Problem(what=f"The recipe {name} cannot be read.", where=wanted_by or name, why=f"{reason}.", next=remedy)


def _syntax(error: yaml.MarkedYAMLError, *, file: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{file}:{mark.line + 1}" if mark else file
    column = f", column {mark.column + 1}" if mark else ""
    is_yaml = isinstance(error, yaml.constructor.ConstructorError)
    return Problem(
        what="The recipe holds what no recipe may hold." if is_yaml else "The recipe is not YAML.",
        where=where,
        why=f"{error.problem or error.context}{column}.",
        next="Write text, numbers, true or false, lists and sections here, without tags."
        if is_yaml
        else "Look at this line and the one before: indentation by spaces, a space after each colon, closed quotes.",
    )


def _not_a_recipe(file: str, why: str) -> Problem:
    return Problem(
        what=f"{file} is not a recipe.",
        where=f"{file}:1",
        why=f"{why[0].upper()}{why[1:]}.",
        next="Write name, model and data at least; `quench init` writes a commented recipe.",
    )


def _twice(name: str, *, first: str, again: str) -> Problem:
    return Problem(
        what=f"`{name}` is written twice.",
        where=f"{again} {name}",
        why=f"YAML would silently keep the last; the first is at {first}.",
        next="Remove one of the two.",
    )
