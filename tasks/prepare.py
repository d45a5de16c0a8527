"""prepare: rows of the training domain -> dataset (train / dev / test / general), rendered, tokenised, split."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.data.origin import source_name
from recipes.schema import Recipe
from recipes.scorers import scored_columns
from tasks.runtime.step import External, Step, present

IDENTITY = {"dev", "test", "salt", "max_length", "near_duplicates"}


def step(
    recipe: Recipe,
    *,
    data: Sequence[External],
    tokenizer: External,
    general: External | None = None,
    template: External | None = None,
) -> Step:
    """The dataset of a recipe. Only the tokenizer's files of the base are an input, not its weights.

    Args:
        recipe: The recipe.
        data: One per source; as inputs they are called data, data-1, data-2 ...
        tokenizer: Tokenizer files of the base.
        general: The general hold-out.
        template: Jinja file, for a base that has none.
    """
    settings = recipe.data
    sources = {source_name(number): source for number, source in enumerate(data)}
    ignored = settings.near_duplicates == "ignore"
    return Step(
        stage="prepare",
        slug=recipe.name,
        entry="tasks.jobs.prepare:run",
        version=3,
        params={
            **settings.model_dump(include=IDENTITY),
            "domain": settings.domain_column,
            "group": settings.group_column,
            "scored_columns": scored_columns(recipe.evaluate.scorers),
            "sources": [part.model_dump(exclude={"path", "revision"}) for part in settings.parts],
            **({} if ignored else {"near_duplicate_jaccard": settings.near_duplicate_jaccard}),
            "chat_template": recipe.model.chat_template if template is None else None,
            "template_args": recipe.model.template_args,
            "template_date": recipe.model.template_date,
        },
        inputs=present(tokenizer=tokenizer, general=general, template=template) | sources,
        tools=("transformers", "tokenizers", "trl"),
    )
