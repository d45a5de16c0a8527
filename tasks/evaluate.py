"""evaluate: one arm, loaded from its stored artifact in a fresh process -> scores, a row a row and metric."""

from __future__ import annotations

from recipes.arms import KV
from recipes.schema import Recipe
from tasks.quantize import readers
from tasks.runtime.step import External, Step


def step(recipe: Recipe, arm: str, *, kind: str, inputs: dict[str, Step | External], kv: KV | None = None) -> Step:
    """Scores of an arm.

    Args:
        recipe: The recipe.
        arm: Its slug.
        kind: How its model is loaded.
        inputs: model, dataset and, where there are, reference, adapter and databases; calibset for KV scales from it.
        kv: How its KV cache is stored; None for bf16.
    """
    asked = recipe.evaluate
    scorer = asked.scorer.model_dump(exclude={"databases"})  # its content is an input
    external = asked.externals.get(arm)
    template = external.chat_template if external else None
    return Step(
        stage="evaluate",
        slug=arm,
        entry="tasks.jobs.evaluate:run",
        version=2,
        params={
            "kind": kind,
            "kv": kv,
            "scorer": scorer,
            **asked.model_dump(include={"max_new_tokens", "batch_size", "seed"}),
            **({"chat_template": template} if template else {}),
        },
        inputs=inputs,
        tools=readers(inputs["model"]),
        gpus=1,
    )
