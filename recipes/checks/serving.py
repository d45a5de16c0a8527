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
from recipes.schemes.ranks import ServedModel
from recipes.schemes.schema import SchemeSpec
from recipes.schemes.scheme import Scheme


def warnings(loaded: Loaded) -> list[Problem]:
    """Every arm that cannot be, ranks that the model cannot be split over, every scheme that the engine refuses.

    What `check` refuses is left out here; nothing is known about the engine where the base is not local.
    """
    problems = list(unavailable(loaded))
    if loaded.recipe.serve.engine != "none" and loaded.base is not None:
        with contextlib.suppress(RecipeError):  # check reports it
            problems += _unserved(loaded, read_headers(loaded.base))
    return [loaded.placed(problem) for problem in problems]


def scheme_entries(recipe: Recipe) -> Iterator[tuple[str, str | SchemeSpec]]:
    """Every entry of the recipe that names a scheme, with its field."""
    yield from ((f"quantize.schemes.{index}", entry) for index, entry in enumerate(recipe.quantize.schemes))
    yield from ((f"evaluate.on_base.{index}", slug) for index, slug in enumerate(recipe.evaluate.on_base))


def schemes(recipe: Recipe) -> Iterator[tuple[str, Scheme]]:
    """Every scheme of the recipe with its field, without the entries that name none: `check` refuses those."""
    for field, entry in scheme_entries(recipe):
        with contextlib.suppress(RecipeError):
            yield field, specified(entry)


def _unserved(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    serve = loaded.recipe.serve
    assert serve.engine != "none"
    model, ranks = ServedModel.of(headers), serve.tensor_parallel
    unsplit = refusals(None, model, engine=serve.engine, tensor_parallel=ranks)
    yield from unsplit
    for field, scheme in schemes(loaded.recipe):
        for find in (refusals, cautions):
            # What no scheme can mend is said once, at serve.tensor_parallel.
            for problem in find(scheme, model, engine=serve.engine, tensor_parallel=1 if unsplit else ranks):
                yield replace(problem, where=field)
