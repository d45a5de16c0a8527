"""reference: logits of nf4-adapter, the model as it was trained, over the completions of dev and test."""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.runtime.step import External, Step


def step(recipe: Recipe, *, dataset: Step, base: External, adapter: Step) -> Step:
    """What every arm's KL and top-1 agreement are measured against."""
    return Step(
        stage="reference",
        slug=recipe.name,
        entry="tasks.jobs.reference:run",
        version=1,
        params=recipe.evaluate.model_dump(include={"batch_size", "reference_gib", "seed"}),
        inputs={"dataset": dataset, "base": base, "adapter": adapter},
        tools=("torch", "transformers", "peft", "bitsandbytes"),
        gpus=1,
    )
