"""choose: candidates -> the one that comes after. With a fixed merge base the choice is trivial."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.schema import Recipe
from tasks.runtime.step import External, Step


def step(recipe: Recipe, *, candidates: Mapping[str, Step], lineage: Mapping[str, Step | External]) -> Step:
    """The merged model that the schemes quantize.

    The identity holds what the candidates come from, not how one is chosen, and the digest is that of the chosen
    artifact: where another policy names the same model, everything below stays a hit.
    """
    return Step(
        stage="choose",
        slug=recipe.name,
        entry="tasks.jobs.choose:run",
        version=1,
        params={},
        inputs=candidates,
        lineage=lineage,
    )
