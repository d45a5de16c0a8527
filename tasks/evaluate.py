"""evaluate: one arm, loaded from its stored artifact in a fresh process -> scores, a row a row and metric."""

from __future__ import annotations

from recipes.arms import KV
from recipes.schema import Recipe
from tasks.quantize import readers
from tasks.rehearse import packages
from tasks.runtime.step import External, Step


def step(recipe: Recipe, arm: str, *, kind: str, inputs: dict[str, Step | External], kv: KV | None = None) -> Step:
    """Scores of an arm.

    Args:
        recipe: The recipe.
        arm: Its slug.
        kind: How its model is loaded.
        inputs: model, dataset, reference, adapter where there is one, what scorers read; calibset for KV scales.
        kv: How its KV cache is stored; None for bf16.
    """
    asked = recipe.evaluate
    return Step(
        stage="evaluate",
        slug=arm,
        entry="tasks.jobs.evaluate:run",
        version=2,
        params={
            "kind": kind,
            "kv": kv,
            "scorers": [one.params() for one in asked.scorers],
            **asked.model_dump(include={"max_new_tokens", "batch_size", "seed"}),
        },
        inputs=inputs,
        tools=(*readers(inputs["model"]), *packages(recipe)),
        gpus=1,
    )
