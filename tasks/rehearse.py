"""rehearse: the recipe's scorers on the data's own answers, before anything is trained.

What a scorer rejects, or cannot load, it would reject or not load in every arm's evaluation.
"""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.runtime.step import External, Step

PACKAGES = {"json-schema": "jsonschema", "lm-eval": "lm-eval"}  # kind -> package that decides its scores


def step(recipe: Recipe, *, dataset: Step, scorers: dict[str, External]) -> Step:
    """What the scorers say of the reference answers; no model is loaded."""
    return Step(
        stage="rehearse",
        slug=recipe.name,
        entry="tasks.jobs.rehearse:run",
        version=1,
        params={"scorers": [one.params() for one in recipe.evaluate.scorers]},
        inputs={"dataset": dataset, **scorers},
        tools=packages(recipe),
    )


def packages(recipe: Recipe) -> tuple[str, ...]:
    """Packages beside Quench that decide scores."""
    return tuple(sorted({PACKAGES[one.kind] for one in recipe.evaluate.scorers if one.kind in PACKAGES}))
