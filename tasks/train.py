"""train: dataset + base -> adapter, by NF4 QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.runtime.step import External, Step


def step(
    recipe: Recipe, *, dataset: Step, base: External, adapter: External | None = None, after: tuple[Step, ...] = ()
) -> Step:
    """The adapter of a recipe: trained, or taken from elsewhere (train.adapter).

    Args:
        recipe: The recipe.
        dataset: The dataset.
        base: The base model.
        adapter: Is taken instead of training one.
        after: Steps that have to be made before training starts.
    """
    if adapter is not None:
        return Step(
            stage="train",
            slug=recipe.name,
            entry="tasks.jobs.adopt:run",
            version=1,
            params={"trained_here": False},
            inputs={"dataset": dataset, "adapter": adapter},
            tools=("safetensors",),
        )
    return Step(
        stage="train",
        slug=recipe.name,
        entry="tasks.jobs.train:run",
        version=4,
        params=recipe.train.model_dump(exclude={"adapter"}),
        inputs={"dataset": dataset, "base": base},
        tools=("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"),
        after=after,
        gpus=1,
        distributed=True,
    )
