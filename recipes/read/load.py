"""YAML (+ extends, + --set a.b=c) -> Recipe. Every error at once, with file, line and remedy."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from recipes.data.rows import Origin, origins
from recipes.plain import is_list, is_mapping
from recipes.problem import Problem, RecipeError
from recipes.read.complaints import explain
from recipes.read.secrets import override_problems
from recipes.read.yamlfile import Document, parse, parse_value
from recipes.schema import Recipe, is_hub_id
from recipes.scorers import CALLABLE, PythonCallable, Scorer, SqlExecution
from recipes.section import can_be_asked_for

# A relative path counts from where it is written: the file that holds it, or the current folder for --set.
PATH_FIELDS = (
    "model.base",
    "model.chat_template",
    "data.path",
    "data.general",
    "calibrate.general",
    "train.adapter",
)
SCORER_PATHS = ("databases", "schema_file", "include", "callable")  # of each entry of evaluate.scorers
HUB_NEVER = (".jsonl", ".json", ".csv", ".parquet")  # endings of a file


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A valid recipe and where each of its fields was written.

    Attributes:
        recipe: The recipe.
        path: The file that was asked for.
        folder: Its folder: relative paths in `recipe` count from here.
        text: The file as it was written.
        places: `file:line` (or `--set`) of every field that is not a default, by dotted name.
    """

    recipe: Recipe
    path: Path
    folder: Path
    text: str
    places: dict[str, str]

    def where(self, field: str) -> str:
        """`recipe.yaml:12 train.rank`; a default stands where its section does."""
        return f"{_place(field, self.places) or shown(self.path)} {field}"

    def resolve(self, path: str) -> Path:
        """A path of the recipe as an absolute path."""
        try:
            return (self.folder / Path(path).expanduser()).resolve()
        except RuntimeError:  # ~NAME of nobody: a file's name like any other
            return (self.folder / path).resolve()

    @property
    def base(self) -> Path | None:
        """Folder of the base model; None for a hub id."""
        return self._local(self.recipe.model.base)

    @property
    def data(self) -> list[Path | None]:
        """File or folder of each source of the data; None for a hub id."""
        return [self._local(source.path) for source in self.recipe.data.parts]

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter that stands in place of training; None for a hub id and where the recipe trains."""
        named = self.recipe.train.adapter
        return None if named is None else self._local(named)

    @property
    def externals(self) -> dict[str, Path | None]:
        """Folder of each external model by name; None for a hub id."""
        return {name: self._local(one.path) for name, one in self.recipe.evaluate.externals.items()}

    @property
    def origins(self) -> dict[str, Origin]:
        """Sources of the data that are here, by the field that names their path."""
        asked, scorers = self.recipe.data, self.recipe.evaluate.scorers
        columns = (asked.group, *(one.schema_column for one in scorers if isinstance(one, SqlExecution)))
        sources = [source.model_dump() for source in asked.parts]
        paths = [path or Path() for path in self.data]
        found = origins(paths, sources, domain=asked.domain, columns=columns)
        here = [path is not None and path.exists() for path in self.data]
        return {asked.field(i): origin for i, origin in enumerate(found) if here[i]}

    def content(self, scorer: Scorer) -> Path | None:
        """The file or folder that a scorer reads; None where it reads none. A callable's need not exist."""
        if isinstance(scorer, PythonCallable):
            source = scorer.parts.source
            return self.resolve(source) if source.endswith(".py") else module_file(source, folder=self.folder)
        return None if scorer.path is None else self.resolve(scorer.path)

    def _local(self, name: str) -> Path | None:
        """A hub id has no file's ending, and its first part is no folder here."""
        hub = is_hub_id(name, folder=self.folder) and not name.endswith(HUB_NEVER)
        return None if hub and not (self.folder / name.split("/")[0]).is_dir() else self.resolve(name)

    def placed(self, problem: Problem) -> Problem:
        """The problem with file and line before a `where` that is a bare field name."""
        return replace(problem, where=self.where(problem.where)) if _is_field(problem.where) else problem


class InvalidRecipe(RecipeError):
    """Fields that cannot be taken; `rest` is the recipe with defaults in their place, None where there is none."""

    def __init__(self, problems: Sequence[Problem], *, rest: Loaded | None) -> None:
        self.rest = rest
        super().__init__(problems)


class _Merged(NamedTuple):
    """Values and places after `extends` and `--set`."""

    values: dict[str, Any]
    places: dict[str, str]


def load(path: Path, *, sets: Sequence[str] = ()) -> Loaded:
    """Read, extend, override and validate a recipe.

    Args:
        path: YAML file.
        sets: Overrides `a.b=c`; the value is YAML, a number in the name indexes a list.

    Raises:
        RecipeError: With every problem of the file, of what it extends and of the overrides.
    """
    problems: list[Problem] = []
    document = parse(path, shown=shown(path), problems=problems)
    if document is None:
        raise RecipeError(problems)
    merged = _extended(document, path=path, chain=(), problems=problems)
    for item in sets:
        problems += override_problems(item)
        _override(merged, item, folder=path.parent, problems=problems)

    def loaded(recipe: Recipe) -> Loaded:
        folder = path.resolve().parent
        return Loaded(recipe=recipe, path=path, folder=folder, text=document.text, places=merged.places)

    try:
        recipe = Recipe.model_validate(merged.values, strict=True)
    except ValidationError as error:
        complaints = explain(error, merged.values)
        for complaint in complaints:
            place = _place(complaint.field, merged.places) or shown(path)
            problems.append(replace(complaint.problem, where=f"{place} {complaint.field}"))
        rest = _without(merged.values, [complaint.field for complaint in complaints])
        raise InvalidRecipe(problems, rest=loaded(rest) if rest else None) from None
    if problems:
        raise InvalidRecipe(problems, rest=loaded(recipe))
    return loaded(recipe)


def _without(values: dict[str, Any], fields: Sequence[str]) -> Recipe | None:
    """The recipe without these fields, so that what else is wrong with it can be told at the same time."""
    rest = deepcopy(values)
    for field in fields:
        inner: Any = rest
        *sections, last = field.split(".")
        for section in sections:
            inner = inner.get(section) if is_mapping(inner) else None
        if is_mapping(inner):
            inner.pop(last, None)
        else:
            return None
    try:
        return Recipe.model_validate(rest, strict=True)
    except ValidationError:
        return None


def module_file(name: str, *, folder: Path) -> Path:
    """Source of a module, found without importing anything: below `folder`, else where Python would look.

    Where there is none, the file that it would be below `folder`.
    """
    first, *rest = name.split(".")
    spec = PathFinder.find_spec(first, [str(folder), *sys.path])
    here = folder / Path(*name.split(".")).with_suffix(".py")
    if spec is None:
        return here
    if not rest:
        return Path(spec.origin) if spec.origin else here
    below = [Path(place, *rest) for place in spec.submodule_search_locations or ()]
    files = [file for path in below for file in (path.with_suffix(".py"), path / "__init__.py")]
    return next((file for file in files if file.is_file()), here)


def missing(path: Path, *, field: str, kind: str) -> Problem:
    """A file or folder that a field names and that is not there, with the nearest name."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    return Problem(
        what=f"{field} names a {kind} that is not there: {shown(path)}.",
        where=field,
        why="Relative paths count from the folder of the file in which they are written.",
        next=f"Did you mean {shown(path.parent / near[0])}?" if near else "Correct the path.",
    )


def shown(path: Path) -> str:
    """The path as a reader types it: relative where it lies below the current folder."""
    here = Path.cwd()
    full = path if path.is_absolute() else here / path
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(path)


def _place(field: str, places: dict[str, str]) -> str | None:
    """Where a field or the nearest section around it was written."""
    parts = field.split(".")
    for end in range(len(parts), 0, -1):
        found = places.get(".".join(parts[:end]))
        if found:
            return found
    return None


def _is_field(name: str) -> bool:
    return name.split(".")[0] in Recipe.model_fields and " " not in name and "/" not in name


# ---- extends


def _extended(document: Document, *, path: Path, chain: tuple[Path, ...], problems: list[Problem]) -> _Merged:
    """The document over what it extends: mappings are merged key by key, all else is replaced."""
    values = dict(document.values)
    parent = values.pop("extends", None)
    if parent is None:
        return _Merged(values, dict(document.places))
    where = f"{document.places['extends']} extends"
    base = _parent(parent, path=path, chain=(*chain, path.resolve()), where=where, problems=problems)
    if base is None:
        return _Merged(values, dict(document.places))
    return _Merged(_deep(base.values, values), {**base.places, **document.places})


def _parent(
    name: object, *, path: Path, chain: tuple[Path, ...], where: str, problems: list[Problem]
) -> _Merged | None:
    if not isinstance(name, str) or not can_be_asked_for(name):
        problems.append(
            Problem(
                what="`extends` is not the path of one file.",
                where=where,
                why="A recipe extends one other recipe, from which it takes every key that it does not set.",
                next="Write `extends: other.yaml`; a chain of files is allowed.",
            )
        )
        return None
    target = path.parent / name
    if target.resolve() in chain:
        circle = " -> ".join(shown(step) for step in (*chain, target.resolve()))
        problems.append(
            Problem(
                what="The recipes extend each other in a circle.",
                where=where,
                why=f"{circle}: no file would be the first.",
                next="Remove one `extends`.",
            )
        )
        return None
    document = parse(target, shown=shown(target), problems=problems, wanted_by=where)
    if document is None:
        return None
    merged = _extended(document, path=target, chain=chain, problems=problems)
    _rebase(merged.values, written_in=target.resolve().parent, folder=path.resolve().parent)
    return merged


def _deep(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        before = merged.get(key)
        # Another `kind` is another thing: keys of the old kind do not belong to it.
        if is_mapping(value) and is_mapping(before) and value.get("kind", before.get("kind")) == before.get("kind"):
            merged[key] = _deep(before, value)
        else:
            merged[key] = value
    return merged


def _rebase(values: dict[str, Any], *, written_in: Path, folder: Path, only: str | None = None) -> None:
    """Make relative paths that were written elsewhere count from `folder`; hub ids and missing files stay."""
    for field in (*PATH_FIELDS, *_listed(values)):
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


def _listed(values: dict[str, Any]) -> list[str]:
    """Names of the paths inside lists of sections, and of external models."""
    found: list[str] = []
    for section, name, fields in (("data", "sources", ("path",)), ("evaluate", "scorers", SCORER_PATHS)):
        around = values.get(section)
        entries = around.get(name) if is_mapping(around) else None
        count = len(entries) if is_list(entries) else 0
        found += [f"{section}.{name}.{number}.{field}" for number in range(count) for field in fields]
    evaluated = values.get("evaluate")
    external = evaluated.get("external") if is_mapping(evaluated) else None
    for name in external if is_mapping(external) else ():
        found += [f"evaluate.external.{name}", f"evaluate.external.{name}.path"]
    return found


def _path_and_function(written: str) -> tuple[str, str]:
    """`dir/file.py:f` -> (`dir/file.py`, `:f`); a module has no path."""
    found = CALLABLE.fullmatch(written)
    if found is None or not found["source"].endswith(".py"):
        return "", written
    return found["source"], f":{found['function']}"


# ---- --set


def _override(merged: _Merged, item: str, *, folder: Path, problems: list[Problem]) -> None:
    """Apply one `a.b=c` in place, or add the problem that it is."""
    name, equals, text = item.partition("=")
    if not equals or not all(name.split(".")):
        problems.append(
            Problem(
                what=f"`--set {item}` is not an override.",
                where=f"--set {item}",
                why="An override has a dotted field name, an equals sign and a YAML value.",
                next="Write for example --set train.rank=32 or --set quantize.schemes.0=gptq-w4-g64.",
            )
        )
        return
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        problems.append(
            Problem(
                what=f"The value of `--set {name}` is not YAML.",
                where=f"--set {item}",
                why=f"`{text}` cannot be read as a number, a word, a list or a mapping.",
                next=f"Quote it for the shell and for YAML: --set '{name}=\"...\"'.",
            )
        )
        return
    refusal = _assign(merged.values, name.split("."), value)
    if refusal:
        problems.append(replace(refusal, where=f"--set {item}"))
        return
    for known in [place for place in merged.places if place.startswith(f"{name}.")]:
        del merged.places[known]
    merged.places[name] = f"--set {item}"
    _rebase(merged.values, written_in=Path.cwd(), folder=folder.resolve(), only=name)


def _assign(values: dict[str, Any], parts: list[str], value: object) -> Problem | None:
    """Set a value inside nested mappings and lists; mappings on the way are copied or made, lists must be there."""
    inner: dict[str, Any] | list[Any] = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        at = ".".join(parts[:depth])
        if isinstance(inner, list):
            if not part.isdigit() or int(part) >= len(inner):
                return _no_place(
                    f"`{at}` is a list of {len(inner)}", f"Use an index from {at}.0 to {at}.{len(inner) - 1}."
                )
            key: Any = int(part)
            following: Any = inner[key]
        else:
            key, following = part, inner.get(part)
        if last:
            inner[key] = value
            return None
        following = _copied(following, next_part=parts[depth + 1])
        if following is None:
            whole = ".".join(parts[: depth + 1])
            return _no_place(f"`{whole}` is no section or list of the file", f"Set it as a whole: --set '{whole}=...'.")
        inner[key] = inner = following
    return None


def _copied(value: object, *, next_part: str) -> dict[str, Any] | list[Any] | None:
    """A copy of a mapping or list to write into; a new mapping for nothing; None for anything else."""
    if is_mapping(value):
        return dict(value)
    if is_list(value):
        return value.copy()
    return {} if value is None and not next_part.isdigit() else None


def _no_place(why: str, remedy: str) -> Problem:
    return Problem(what="The override has no place in this recipe.", where="", why=f"{why}.", next=remedy)
