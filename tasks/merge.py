"""merge: base + adapter -> model, bf16, merged into the dequantized NF4 weights of training or the original ones."""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.runtime.step import External, Step


def step(recipe: Recipe, *, base: External, adapter: Step | External, onto: str) -> Step:
    """One merged model. `onto` is `dequantized` or `original`."""
    slug = f"{recipe.name}-{onto}"
    return alone(slug, base=base, adapter=adapter, onto=onto, accept_other_base=recipe.merge.accept_other_base)


def alone(slug: str, *, base: External, adapter: Step | External, onto: str, accept_other_base: bool) -> Step:
    """The same without a recipe."""
    return Step(
        stage="merge",
        slug=slug,
        entry="tasks.jobs.merge:run",
        version=6,
        params={"onto": onto, "accept_other_base": accept_other_base},
        inputs={"base": base, "adapter": adapter},
        tools=("torch", "transformers", "peft", "bitsandbytes"),
    )
