"""External models: what of their folders can be refused before anything is spent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.models.defaults import complete
from recipes.models.headers import Headers
from recipes.models.installed import is_known
from recipes.models.refusals import has_tokenizer, no_config, no_tokenizer, type_problems
from recipes.models.weights import read_tensors
from recipes.plain import is_list, is_mapping, json_object
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded

COMMIT = re.compile(r"[0-9a-f]{40}")


def folder_problems(name: str, folder: Path, *, trusted: bool) -> Iterator[Problem]:
    """What config.json, the safetensors headers and the tokenizer's files of an external model show.

    Args:
        name: Its name.
        folder: Its folder.
        trusted: Code that comes with it may run.
    """
    field = f"evaluate.external.{name}"
    config = json_object(folder / "config.json")
    if config is None:
        yield _no_config(name, folder, where=field)
        return
    if needs_code(config) and not trusted:
        yield Problem(
            what=f"{name} needs code of its own: its config.json has an auto_map.",
            where=field,
            why=f"transformers here knows no model type {config.get('model_type')}, and code that comes with a model "
            "runs as you, with your files.",
            next="Name a model of a type that transformers has; or read that code, then write "
            "`trust_remote_code: true` beside its path.",
        )
    try:
        _ = external_headers(folder).cache_layers  # which plan and run count
    except RecipeError as error:
        yield from (_of_external(problem, name, where=f"{field} {problem.where}") for problem in error.problems)
    if not has_tokenizer(folder):
        problem = _of_external(no_tokenizer(folder), name, where=field)
        yield replace(problem, next=f"Copy those of the model that it was made from into {folder}.")


def needs_code(config: Mapping[str, Any]) -> bool:
    """True where only code that comes with the model can load it: transformers has its own for types that it knows."""
    return "auto_map" in config and not is_known(str(config.get("model_type")))


def unpinned_problems(loaded: Loaded) -> Iterator[Problem]:
    """Code in a hub repository without a commit: what a branch or tag names may change."""
    for name, model in loaded.recipe.evaluate.externals.items():
        local = loaded.externals[name] is not None
        if model.trust_remote_code and not local and not COMMIT.fullmatch(model.revision or ""):
            yield Problem(
                what=f"Code of {model.path} is to be run, and no commit is named.",
                where=f"evaluate.external.{name}.revision",
                why=f"{model.revision or 'The default branch'} may name other code tomorrow than what you have read.",
                next="Write the commit that you have read as `revision`, 40 hex digits.",
            )


def external_headers(folder: Path) -> Headers:
    """Config and tensors of an external model. No linear layers: in a quantized one the headers do not show them.

    Raises:
        RecipeError: Its index and headers have problems, or its config.json has sizes that are none or leaves out what
            nothing else tells.
    """
    config = json_object(folder / "config.json") or {}
    if problems := list(type_problems(folder, config)):
        raise RecipeError(problems)
    text = complete(folder, config)
    if isinstance(text, Problem):
        raise text.error()
    return Headers(
        folder=folder,
        config=config,
        text_config=text,
        tensors=read_tensors(folder),
        linears=(),
    )


def reference_problems(loaded: Loaded) -> Iterator[Problem]:
    """A reference with another vocabulary than the base; finer differences show in the reference step, by the rows."""
    name = loaded.recipe.evaluate.reference
    folder, base = (loaded.externals.get(name) if name else None), loaded.base
    if folder is None or base is None:
        return
    own, other = _vocabulary(folder), _vocabulary(base)
    if own is not None and other is not None and own != other:
        yield Problem(
            what=f"{name} has another vocabulary than the base.",
            where="evaluate.reference",
            why=f"KL compares probabilities token by token: {len(own):,} tokens here, {len(other):,} in the base.",
            next="Name a model with the base's tokenizer, or leave evaluate.reference out.",
        )


def _no_config(name: str, folder: Path, *, where: str) -> Problem:
    if (folder / "adapter_config.json").exists():
        return Problem(
            what=f"{name} is an adapter, not a model.",
            where=where,
            why="An external model is loaded whole, as it would be served.",
            next=f"Merge it: quench merge BASE {folder} OUT, then name the folder that it writes.",
        )
    problem = _of_external(no_config(folder), name, where=where)
    return replace(problem, why=f"{problem.why.removesuffix('.')}; looked for in {folder}.")


def _of_external(problem: Problem, name: str, *, where: str) -> Problem:
    """A problem that recipes.models words for the base, of the external model of this name."""
    return replace(
        problem,
        what=problem.what.replace("The base", name),
        next=problem.next.replace("the base", name).replace("model.base", f"evaluate.external.{name}"),
        where=where,
    )


def _vocabulary(folder: Path) -> dict[str, Any] | None:
    """Token -> id of a byte-pair tokenizer.json; None for other kinds."""
    tokenizer = json_object(folder / "tokenizer.json") or {}
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if is_mapping(model) else None
    if not is_mapping(vocabulary):
        return None
    tokens = [token for token in added if is_mapping(token)] if is_list(added) else []
    return {**vocabulary, **{str(token.get("content")): token.get("id") for token in tokens}}
