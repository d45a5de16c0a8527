"""rehearse: dataset -> what the recipe's scorers say of the data's own answers, before anything is trained.

An answer that a scorer rejects here, or a scorer that does not load, would fail in every arm's evaluation; rows of
train that are in dev or test would make all of their figures too good.
"""

from __future__ import annotations

from collections.abc import Mapping

from recipes.schema import Recipe
from tasks.arm import scorer_packages
from tasks.runtime.step import External, Step


def step(recipe: Recipe, *, dataset: Step, scorers: Mapping[str, External]) -> Step:
    """Scores of the reference answers; no model is loaded."""
    return Step(
        stage="rehearse",
        slug=recipe.name,
        entry="tasks.jobs.rehearse:run",
        version=3,
        params={
            "scorers": [scorer.params() for scorer in recipe.evaluate.scorers],
            "max_new_tokens": recipe.evaluate.max_new_tokens,
            "max_near_duplicates": recipe.calibrate.max_near_duplicates,
            "group": recipe.data.group_column,
        },
        inputs={"dataset": dataset, **scorers},
        tools=scorer_packages(recipe),
    )
