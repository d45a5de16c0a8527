"""What a recipe's values are: its file, over what it `extends`, under `--set`.

A relative path counts from where it is written: the file that holds it, or the current folder for `--set`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipes.plain import is_list, is_mapping
from recipes.problem import Problem, RecipeError, shown
from recipes.read.yamlfile import RecipeFile, parse, parse_value
from recipes.scorers import CALLABLE
from recipes.section import can_be_asked_for

PATH_FIELDS = (
    "model.base",
    "model.chat_template",
    "data.path",
    "data.general",
    "calibrate.general",
    "train.adapter",
)
SCORER_PATHS = ("databases", "schema_file", "include", "callable")  # of each entry of evaluate.scorers


class Merged(NamedTuple):
    """Values, `file:line` (or `--set`) of each field, and what is wrong with the files."""

    values: dict[str, Any]
    places: dict[str, str]
    problems: list[Problem]


# ---- extends


def extended(file: RecipeFile, *, path: Path, chain: tuple[Path, ...] = ()) -> Merged:
    """The file over what it extends: mappings are merged key by key, all else is replaced.

    Args:
        file: The file as it is written.
        path: Where it is.
        chain: Files that extend this one, the first one first.
    """
    own = Merged(dict(file.values), dict(file.places), list(file.problems))
    parent = own.values.pop("extends", None)
    if parent is None:
        return own
    where = f"{file.places['extends']} extends"
    try:
        base = _parent(parent, path=path, chain=(*chain, path.resolve()), where=where)
    except RecipeError as error:
        own.problems.extend(error.problems)
        return own
    places = {**base.places, **own.places}
    return Merged(_merged(base.values, own.values), places, [*own.problems, *base.problems])


def _parent(name: object, *, path: Path, chain: tuple[Path, ...], where: str) -> Merged:
    if not isinstance(name, str) or not can_be_asked_for(name):
        raise Problem(
            what="`extends` is not the path of one file.",
            where=where,
            why="A recipe extends one other recipe, from which it takes every key that it does not set.",
            next="Write `extends: other.yaml`; a chain of files is allowed.",
        ).error()
    target = path.parent / name
    if target.resolve() in chain:
        circle = " -> ".join(shown(file) for file in (*chain, target.resolve()))
        raise Problem(
            what="The recipes extend each other in a circle.",
            where=where,
            why=f"{circle}: no file would be the first.",
            next="Remove one `extends`.",
        ).error()
    merged = extended(parse(target, wanted_by=where), path=target, chain=chain)
    _rebase(merged.values, written_in=target.resolve().parent, folder=path.resolve().parent)
    return merged


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        before = merged.get(key)
        # Another `kind` is another thing: keys of the old kind do not belong to it.
        if is_mapping(value) and is_mapping(before) and value.get("kind", before.get("kind")) == before.get("kind"):
            merged[key] = _merged(before, value)
        else:
            merged[key] = value
    return merged


# ---- --set


def override(merged: Merged, item: str, *, folder: Path) -> None:
    """Apply one `a.b=c` in place.

    Args:
        merged: Values and places, which change.
        item: As it was typed.
        folder: Folder of the recipe: its relative paths count from there.

    Raises:
        RecipeError: It is no override, or has no place in this recipe.
    """
    where = f"--set {item}"
    name, equals, text = item.partition("=")
    if not equals or not all(name.split(".")):
        raise Problem(
            what=f"`--set {item}` is not an override.",
            where=where,
            why="An override has a dotted field name, an equals sign and a YAML value.",
            next="Write for example --set train.rank=32 or --set quantize.schemes.0=gptq-w4-g64.",
        ).error()
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        raise Problem(
            what=f"The value of `--set {name}` is not YAML.",
            where=where,
            why=f"`{text}` cannot be read as a number, a word, a list or a mapping.",
            next=f"Quote it for the shell and for YAML: --set '{name}=\"...\"'.",
        ).error() from None
    _assign(merged.values, name.split("."), value, where=where)
    for field in [field for field in merged.places if field.startswith(f"{name}.")]:
        del merged.places[field]
    merged.places[name] = where
    _rebase(merged.values, written_in=Path.cwd(), folder=folder.resolve(), only=name)


def _assign(values: dict[str, Any], parts: list[str], value: object, *, where: str) -> None:
    """Set a value inside nested mappings and lists; mappings on the way are copied or made, lists must be there."""
    inner: dict[str, Any] | list[Any] = values
    for depth, part in enumerate(parts):
        if isinstance(inner, list):
            if not part.isdigit() or int(part) >= len(inner):
                at = ".".join(parts[:depth])
                why = f"`{at}` is a list of {len(inner)}"
                raise _no_place(why, f"Use an index from {at}.0 to {at}.{len(inner) - 1}.", where=where).error()
            key: Any = int(part)
            following: Any = inner[key]
        else:
            key, following = part, inner.get(part)
        if depth == len(parts) - 1:
            inner[key] = value
            return
        following = _copied(following, next_part=parts[depth + 1])
        if following is None:
            whole = ".".join(parts[: depth + 1])
            why = f"`{whole}` is no section or list of the file"
            raise _no_place(why, f"Set it as a whole: --set '{whole}=...'.", where=where).error()
        inner[key] = inner = following


def _copied(value: object, *, next_part: str) -> dict[str, Any] | list[Any] | None:
    """A copy of a mapping or list to write into; a new mapping for nothing; None for anything else."""
    if is_mapping(value):
        return dict(value)
    if is_list(value):
        return value.copy()
    return {} if value is None and not next_part.isdigit() else None


def _no_place(why: str, remedy: str, *, where: str) -> Problem:
    return Problem(what="The override has no place in this recipe.", where=where, why=f"{why}.", next=remedy)


# ---- relative paths


def _rebase(values: dict[str, Any], *, written_in: Path, folder: Path, only: str | None = None) -> None:
    """Make relative paths that were written elsewhere count from `folder`; hub ids and missing files stay."""
    for field in (*PATH_FIELDS, *_nested_path_fields(values)):
        if only is not None and field != only and not field.startswith(f"{only}."):
            continue
        *sections, last = field.split(".")
        inner: Any = values
        for section in sections:
            inner = inner[int(section)] if is_list(inner) else inner.get(section) if is_mapping(inner) else None
        if is_mapping(inner) and isinstance(inner.get(last), str):
            path, function = _path_and_function(inner[last]) if last == "callable" else (inner[last], "")
            if can_be_asked_for(path) and not Path(path).is_absolute() and (written_in / path).exists():
                inner[last] = os.path.relpath(written_in / path, folder) + function


def _nested_path_fields(values: dict[str, Any]) -> list[str]:
    """Path fields inside lists of sections, and of external models."""
    fields: list[str] = []
    for section, name, paths in (("data", "sources", ("path",)), ("evaluate", "scorers", SCORER_PATHS)):
        around = values.get(section)
        entries = around.get(name) if is_mapping(around) else None
        count = len(entries) if is_list(entries) else 0
        fields += [f"{section}.{name}.{number}.{path}" for number in range(count) for path in paths]
    evaluate = values.get("evaluate")
    external = evaluate.get("external") if is_mapping(evaluate) else None
    for name in external if is_mapping(external) else ():
        fields += [f"evaluate.external.{name}", f"evaluate.external.{name}.path"]
    return fields


def _path_and_function(callable: str) -> tuple[str, str]:
    """`dir/file.py:f` -> (`dir/file.py`, `:f`); a module has no path."""
    parts = CALLABLE.fullmatch(callable)
    if parts is None or not parts["source"].endswith(".py"):
        return "", callable
    return parts["source"], f":{parts['function']}"
