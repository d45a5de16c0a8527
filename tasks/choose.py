"""choose: candidates -> the one that comes after. With a fixed merge base the choice is trivial."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.schema import Recipe
from tasks.runtime.step import External, Step

SCORES = "_scores"  # input that holds a candidate's scores: its name with this behind it


def step(
    recipe: Recipe,
    *,
    merged: Mapping[str, Step],
    scores: Mapping[str, Step],
    lineage: Mapping[str, Step | External],
) -> Step:
    """The merged model that the schemes quantize.

    The identity holds what the candidates come from, not how one is chosen, and the digest is that of the chosen
    artifact: where another policy names the same model, everything below stays a hit.

    Args:
        recipe: Its merge.base names one merge, or says `auto`.
        merged: The merged model by its base.
        scores: Its scores, by the same names; read by `auto` alone.
        lineage: What all candidates come from.
    """
    fixed = recipe.merge.base
    if fixed == "auto":
        inputs = {**merged, **{f"{name}{SCORES}": scores[name] for name in merged}}
    else:
        inputs = {fixed: merged[fixed]}
    return Step(
        stage="choose",
        slug=recipe.name,
        entry="tasks.jobs.choose:run",
        version=1,
        params={},
        inputs=inputs,
        lineage=lineage,
    )


def candidates(step: Step) -> list[str]:
    """Names of what a choice is between."""
    return [name for name in step.inputs if not name.endswith(SCORES)]
