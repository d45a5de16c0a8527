"""calibrate: dataset -> calibset: rows of train, stratified, seeded, packed, with fixed token ids."""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.runtime.step import Step

TOKENS_PER_INPUT = 4


def step(recipe: Recipe, *, dataset: Step, largest_in_features: int) -> Step:
    """The calibration set. Fewer than 4 tokens an input feature would leave the widest Hessian badly estimated."""
    return Step(
        stage="calibrate",
        slug=recipe.name,
        entry="tasks.jobs.calibrate:run",
        version=1,
        params={**recipe.calibrate.model_dump(), "min_tokens": TOKENS_PER_INPUT * largest_in_features},
        inputs={"dataset": dataset},
    )
