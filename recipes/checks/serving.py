"""What is warned of: arms that cannot be, and what the engine of serve.engine would not serve.

No refusals, since an arm may be wanted for its figures alone, and a run without one is still a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from recipes.arms import specified
from recipes.checks.arms import unavailable
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded
from recipes.schema import Recipe
from recipes.schemes.engines import cautions, refusals
from recipes.schemes.schema import SchemeSpec


def warnings(loaded: Loaded) -> list[Problem]:
    """Every arm that cannot be, every scheme that the engine refuses, or serves in some versions only.

    A recipe that `check` refuses says nothing here, nor does a base that is not local about the engine.
    """
    found = list(unavailable(loaded))
    serve, base = loaded.recipe.serve, loaded.base
    if serve.engine != "none" and base is not None:
        with contextlib.suppress(RecipeError):  # check says so
            found += _of_schemes(loaded, read_headers(base))
    return [loaded.placed(problem) for problem in found]


def length_problems(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    """serve.max_model_len beyond the base's longest context."""
    asked, limit = loaded.recipe.serve.max_model_len, headers.max_positions
    if asked is not None and limit is not None and asked > limit:
        yield Problem(
            what=f"serve.max_model_len is {asked} tokens; the base ends at {limit}.",
            where="serve.max_model_len",
            why="config.json names the longest context; vLLM refuses to start with a longer one.",
            next=f"Set it to {limit} or less, or leave it out.",
        )


def entries(recipe: Recipe) -> Iterator[tuple[str, str | SchemeSpec]]:
    """Every scheme that the recipe names, with its field."""
    yield from ((f"quantize.schemes.{index}", one) for index, one in enumerate(recipe.quantize.schemes))
    yield from ((f"evaluate.on_base.{index}", one) for index, one in enumerate(recipe.evaluate.on_base))


def _of_schemes(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    serve = loaded.recipe.serve
    assert serve.engine != "none"
    for field, entry in entries(loaded.recipe):
        try:
            scheme = specified(entry)
        except RecipeError:
            continue  # check says so
        for find in (refusals, cautions):
            for problem in find(scheme, headers.linears, serve.engine, serve.tensor_parallel):
                yield replace(problem, where=field)
