"""YAML (+ extends, + --set a.b=c) -> Recipe: every error at once, with file, line and remedy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.data.folders import KINDS, TEXT
from recipes.data.origin import Origin, origins
from recipes.data.raw.opening import ENDINGS
from recipes.plain import is_mapping
from recipes.problem import Problem, RecipeError, shown
from recipes.read.complaints import explain
from recipes.read.merge import extended, override
from recipes.read.secrets import override_problems
from recipes.read.yamlfile import parse
from recipes.schema import Recipe, is_hub_id
from recipes.scorers import PythonCallableSpec, Scorer, scored_columns

HUB_NEVER = (*KINDS, TEXT, *ENDINGS)  # endings of a file


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A valid recipe and where each of its fields was written.

    Attributes:
        recipe: The recipe.
        path: Its file.
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
        """`recipe.yaml:12 train.rank`; a field that is not written has the place of its section."""
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
        """Folder of the adapter in place of training; None for a hub id, and where the recipe trains."""
        adapter = self.recipe.train.adapter
        return None if adapter is None else self._local(adapter)

    @property
    def externals(self) -> dict[str, Path | None]:
        """Folder of each external model by name; None for a hub id."""
        return {name: self._local(model.path) for name, model in self.recipe.evaluate.externals.items()}

    @property
    def origins(self) -> dict[str, Origin]:
        """Sources of the data that are here, by the field that names their path."""
        data, scored = self.recipe.data, scored_columns(self.recipe.evaluate.scorers)
        sources = [source.model_dump() for source in data.parts]
        paths = [path or Path() for path in self.data]
        of_sources = origins(paths, sources, domain=data.domain_column, group=data.group_column, scored=scored)
        local = [path is not None and path.exists() for path in self.data]
        return {data.field(number): origin for number, origin in enumerate(of_sources) if local[number]}

    def content(self, scorer: Scorer) -> Path | None:
        """The file or folder that a scorer reads; None where it reads none. A callable's need not exist."""
        if isinstance(scorer, PythonCallableSpec):
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


def load(path: Path, *, sets: Sequence[str] = ()) -> Loaded:
    """Read, extend, override and validate a recipe.

    Args:
        path: YAML file.
        sets: Overrides `a.b=c`; the value is YAML, a number in the name indexes a list.

    Raises:
        RecipeError: With every problem of the file, of what it extends and of the overrides.
    """
    file = parse(path)
    merged = extended(file, path=path)
    problems = merged.problems
    for item in sets:
        problems += override_problems(item)
        try:
            override(merged, item, folder=path.parent)
        except RecipeError as error:
            problems += error.problems

    def loaded(recipe: Recipe) -> Loaded:
        folder = path.resolve().parent
        return Loaded(recipe=recipe, path=path, folder=folder, text=file.text, places=merged.places)

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
    """The recipe without these fields, so that what else is wrong with it is found at the same time."""
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
    """A field names a file or folder that does not exist; with the nearest name in its folder."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    return Problem(
        what=f"{field} names a {kind} that is not there: {shown(path)}.",
        where=field,
        why="Relative paths count from the folder of the file in which they are written.",
        next=f"Did you mean {shown(path.parent / near[0])}?" if near else "Correct the path.",
    )


def _place(field: str, places: dict[str, str]) -> str | None:
    """Where a field or the nearest section around it was written."""
    parts = field.split(".")
    around = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((places[name] for name in around if name in places), None)


def _is_field(name: str) -> bool:
    return name.split(".")[0] in Recipe.model_fields and " " not in name and "/" not in name
