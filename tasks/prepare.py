"""prepare: rows of the training domain -> dataset (train / dev / test / general), rendered, tokenised, split."""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.runtime.step import External, Step


def step(
    recipe: Recipe,
    *,
    data: External,
    tokenizer: External,
    general: External | None = None,
    template: External | None = None,
) -> Step:
    """The dataset of a recipe. Only the tokenizer's files of the base are an input, not its weights."""
    asked = recipe.data
    inputs = {"data": data, "tokenizer": tokenizer, "general": general, "template": template}
    return Step(
        stage="prepare",
        slug=recipe.name,
        entry="tasks.jobs.prepare:run",
        version=2,
        params={
            **asked.model_dump(include={"format", "domain", "group", "dev", "test", "salt", "max_length"}),
            "chat_template": recipe.model.chat_template if template is None else None,
        },
        inputs={name: one for name, one in inputs.items() if one is not None},
        tools=("transformers", "tokenizers", "trl"),
    )
