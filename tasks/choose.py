"""choose: candidates -> the one that what comes after is made from; with a fixed merge base there is only one."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.schema import Recipe
from tasks.runtime.step import External, Step

SCORES = "_scores"  # the scores of candidate `name` are the input `name_scores`


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
    base = recipe.merge.base
    if base == "auto":
        inputs = {**merged, **{f"{name}{SCORES}": scores[name] for name in merged}}
    else:
        inputs = {base: merged[base]}
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
    """Names of the candidates of a choice."""
    return [name for name in step.inputs if not name.endswith(SCORES)]
