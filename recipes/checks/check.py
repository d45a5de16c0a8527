"""Everything about a recipe that can be refused before anything is spent, all of it at once.

`check` reads config.json, safetensors headers and the first row; `check_data` reads every row. No torch, < 1 s; some
3 s more once for a base whose config.json leaves numbers to transformers' defaults.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from recipes.arms import arms, specified
from recipes.checks.adapter import beside_problems, fit_problems, folder_problems
from recipes.checks.arms import kv_cache_problems
from recipes.checks.external import folder_problems as external_problems
from recipes.checks.external import needs_code, reference_problems, unpinned_problems
from recipes.checks.gate import prefer_problems
from recipes.checks.python import python_problems
from recipes.checks.rows import RowCheck, check_data, general_files, general_problems
from recipes.checks.scorers import scorer_problems
from recipes.checks.serving import scheme_entries, schemes
from recipes.checks.train import device_problems, train_problems
from recipes.data.rows import read_origin
from recipes.models.chat_template import misfit
from recipes.models.headers import Headers, read_headers
from recipes.models.installed import is_installed, is_known
from recipes.models.token_ids import token_problems
from recipes.plain import json_object
from recipes.problem import Problem, RecipeError
from recipes.read.load import InvalidRecipe, Loaded, load, missing
from recipes.schemes.limits import limit_problems, quantized_linears, unquantized_problem

__all__ = ["CheckedRecipe", "RowCheck", "check", "check_base", "check_data", "load_and_check", "load_and_read"]

CHECKOUT = Path(__file__).resolve().parents[2]
OURS = ("flows", "tasks", "recipes")


class CheckedRecipe(NamedTuple):
    """A recipe without a problem, and what its rows show; nothing where they were not read."""

    loaded: Loaded
    rows: RowCheck


def load_and_check(path: Path, *, sets: Sequence[str] = (), data: bool = False) -> Loaded:
    """The recipe alone, see `load_and_read`."""
    return load_and_read(path, sets=sets, data=data).loaded


def load_and_read(path: Path, *, sets: Sequence[str] = (), data: bool = True) -> CheckedRecipe:
    """Load and check in one go: a misspelled key does not hide a missing file.

    Args:
        path: Recipe file.
        sets: Overrides `a.b=c`.
        data: Read every row, too.

    Raises:
        RecipeError: With everything that is wrong.
    """
    rows = RowCheck([], {})
    problems: list[Problem] = []
    try:
        loaded: Loaded | None = load(path, sets=sets)
    except InvalidRecipe as error:
        problems, loaded = list(error.problems), error.rest
    if loaded is not None:
        rows = check_data(loaded) if data else rows
        problems += [*check(loaded), *rows.problems]
    if problems or loaded is None:
        raise RecipeError(problems)
    return CheckedRecipe(loaded, rows)


def check(loaded: Loaded, *, fetched: bool = False) -> list[Problem]:
    """All problems that the recipe, config.json, the safetensors headers and the first row show.

    A base or data set that is a hub id is not local, so it is not checked here: `check_base` does when it is pinned.

    Args:
        loaded: The recipe.
        fetched: It is checked for the second time, with folders in place of hub ids. Whether its Python is allowed was
            checked the first time, on the recipe as it is written.
    """
    problems = [*_shadows(), *_schemes(loaded), *_data(loaded), *scorer_problems(loaded), *_template(loaded)]
    problems += [*beside_problems(loaded), *_adapter(loaded), *_externals(loaded), *prefer_problems(loaded.recipe)]
    problems += [] if fetched else python_problems(loaded)
    problems += device_problems(loaded.recipe, device=loaded.recipe.run.device)
    base = loaded.base
    if base is not None:
        problems += check_base(loaded, base) if base.is_dir() else [missing(base, field="model.base", kind="folder")]
    return [loaded.placed(problem) for problem in problems]


def check_base(loaded: Loaded, folder: Path) -> list[Problem]:
    """Problems of a base model's folder with this recipe; for a hub id, of the folder that it was pinned to."""
    config = json_object(folder / "config.json") or {}
    strange = [*_own_code(config), *_unknown_type(config)]
    try:
        headers = read_headers(folder)
        _ = headers.cache_layers  # counted by plan and run: what they cannot count is said here
    except RecipeError as error:  # a model type that transformers does not have explains what could not be read
        return [loaded.placed(problem) for problem in strange] or list(error.problems)
    problems = [*strange, *token_problems(headers), *_chat_template(loaded, headers)]
    problems += [*_shapes(loaded, headers), *_lengths(loaded, headers), *kv_cache_problems(loaded, headers)]
    problems += train_problems(loaded, headers)
    problems += fit_problems(loaded.adapter, headers) if loaded.adapter else []
    return [loaded.placed(problem) for problem in problems]


# ---- the checkout


def _shadows() -> Iterator[Problem]:
    """A module of the user's that is imported in place of ours."""
    for name in OURS:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin != CHECKOUT / name / "__init__.py":
            folders = list(spec.submodule_search_locations or []) if spec else []
            yield Problem(
                what=f"Another `{name}` is imported in place of Quench's.",
                where=str(origin or (folders[0] if folders else CHECKOUT / name)),
                why=f"Code of two places would be mixed; ours is {CHECKOUT / name}.",
                next=f"Rename {origin.name if origin else name}, or start `quench` from another folder.",
            )


# ---- schemes and the base


def _schemes(loaded: Loaded) -> Iterator[Problem]:
    """Slugs that name no scheme, and arms that would share a name."""
    problems: list[Problem] = []
    for field, entry in scheme_entries(loaded.recipe):
        try:
            specified(entry)
        except RecipeError as error:
            problems += (replace(problem, where=field) for problem in error.problems)
    try:
        if not problems:
            arms(loaded.recipe)
    except RecipeError as error:
        problems += error.problems
    yield from problems


def _shapes(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    """Schemes that the base's layers, or its model type, do not allow, and that would leave it in bf16."""
    for field, scheme in schemes(loaded.recipe):
        refused = [*scheme.check(quantized_linears(scheme, headers)), *limit_problems(scheme, headers)]
        kept = unquantized_problem(scheme, headers)
        if kept and not refused and not loaded.recipe.quantize.accept_unquantized:
            refused = [kept]
        yield from (replace(problem, where=field) for problem in refused)


def _own_code(config: Mapping[str, Any]) -> Iterator[Problem]:
    if needs_code(config):
        yield Problem(
            what="The base needs code of its own: its config.json has an auto_map.",
            where="model.base",
            why=f"transformers here knows no model type {config.get('model_type')}; training, merging and "
            "quantizing run no code that comes with a model, and what they write would need it too.",
            next="Name a base of a type that transformers has. As an external model it can be evaluated "
            "(evaluate.external, trust_remote_code).",
        )


def _unknown_type(config: Mapping[str, Any]) -> Iterator[Problem]:
    kind = config.get("model_type")
    if kind is not None and is_installed() and "auto_map" not in config and not is_known(str(kind)):
        yield Problem(
            what=f"The installed transformers knows no model type {kind}.",
            where="model.base",
            why="Its config.json names it, and no class here loads such a model: it is newer, or a name is misspelt.",
            next="Name a base of a type that transformers has, or take a release of Quench with a newer transformers.",
        )


def _chat_template(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    template = loaded.recipe.model.chat_template
    if template is None and not headers.has_chat_template:
        yield Problem(
            what="The base has no chat template.",
            where="model.base",
            why="Without one, turns cannot be rendered the same way in training, calibration and serving.",
            next="Write `chat_template: chatml` under `model:` (or the path of a Jinja file); `quench init` takes "
            "--chat-template chatml. It is saved into every artifact.",
        )
    if template is not None and headers.has_chat_template:
        yield Problem(
            what=f"The base has a chat template of its own, and the recipe names another one: {template}.",
            where="model.chat_template",
            why="The base was trained with its own; a second one would undo that.",
            next="Remove model.chat_template.",
        )
    if template is None:
        yield from _template_settings(loaded, headers)


def _template_settings(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    """A date that is missing, and what the base's template does not read."""
    model, source = loaded.recipe.model, "\n".join(headers.template.texts)
    if not source:
        return
    wrong = misfit(source, args=model.template_args, has_day=model.template_date is not None)
    if wrong.no_day:
        yield Problem(
            what="The base's chat template prints today's date.",
            where="model.base",
            why="The same rows would get other tokens tomorrow, and answers another prompt than was trained.",
            next=f"Write `template_date: {date.today().isoformat()}` under `model:`; it stays what it was then.",
        )
    if wrong.unread_day:
        yield Problem(
            what="The base's chat template prints no date.",
            where="model.template_date",
            why="The day would change nothing.",
            next="Remove model.template_date.",
        )
    if wrong.unread_args:
        yield Problem(
            what=f"The base's chat template reads no argument {', '.join(wrong.unread_args)}.",
            where="model.template_args",
            why="It would change nothing.",
            next="Correct the name, or remove it.",
        )


def _lengths(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    """Lengths beyond the base's longest context."""
    recipe, limit = loaded.recipe, headers.max_positions
    lengths = {
        "data.max_length": recipe.data.max_length,
        "calibrate.seq_len": recipe.calibrate.seq_len,
        "measure.prompt_tokens": recipe.measure.prompt_tokens + recipe.measure.new_tokens,
        "serve.max_model_len": recipe.serve.max_model_len or 0,
    }
    for field, length in lengths.items():
        if limit is not None and length > limit:
            added = recipe.measure.new_tokens if field == "measure.prompt_tokens" else 0
            yield Problem(
                what=f"{field}{' with measure.new_tokens' if added else ''} is {length} tokens; the base has {limit}.",
                where=field,
                why="config.json names the longest context: positions behind it were never trained, and vLLM refuses "
                "to start with more.",
                next=f"Set {field} to {limit - added} or less.",
            )


def _adapter(loaded: Loaded) -> list[Problem]:
    folder = loaded.adapter
    if folder is None:
        return []
    return folder_problems(folder) if folder.is_dir() else [missing(folder, field="train.adapter", kind="folder")]


def _externals(loaded: Loaded) -> Iterator[Problem]:
    for name, folder in loaded.externals.items():
        if folder is not None and not folder.is_dir():
            yield missing(folder, field=f"evaluate.external.{name}", kind="folder")
        elif folder is not None:
            trusted = loaded.recipe.evaluate.externals[name].trust_remote_code
            yield from external_problems(name, folder, trusted=trusted)
    yield from unpinned_problems(loaded)
    yield from reference_problems(loaded)


# ---- data, template


def _data(loaded: Loaded) -> Iterator[Problem]:
    for number, path in enumerate(loaded.data):
        if path is not None and not path.exists():
            yield missing(path, field=loaded.recipe.data.field(number), kind="file")
    for origin in loaded.origins.values():
        yield from read_origin(origin, max_rows=1).problems
    for field, path in general_files(loaded).items():
        if not path.exists():
            yield missing(path, field=field, kind="file")
        else:
            yield from general_problems(path, max_rows=1)


def _template(loaded: Loaded) -> Iterator[Problem]:
    template = loaded.recipe.model.chat_template
    if template is not None and template != "chatml" and not loaded.resolve(template).is_file():
        yield missing(loaded.resolve(template), field="model.chat_template", kind="file")
