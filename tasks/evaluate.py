"""evaluate: one arm, loaded from its stored artifact in a fresh process -> scores, one line per row and metric."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.arms import KV
from recipes.schema import Recipe
from tasks.arm import readers, scorer_packages, trust
from tasks.runtime.step import External, Step


def step(
    recipe: Recipe,
    arm: str,
    *,
    kind: str,
    inputs: Mapping[str, Step | External],
    kv: KV | None = None,
    after: tuple[Step, ...] = (),
) -> Step:
    """Scores of an arm.

    Args:
        recipe: The recipe.
        arm: Its slug.
        kind: How its model is loaded.
        inputs: model, dataset and, where there are, reference, adapter, calibset (KV scales), what scorers read.
        kv: How its KV cache is stored; None for bf16.
        after: Steps that have to be made before it starts.
    """
    settings = recipe.evaluate
    external = settings.externals.get(arm)
    template = {"chat_template": external.chat_template} if external and external.chat_template else {}
    return Step(
        stage="evaluate",
        slug=arm,
        entry="tasks.jobs.evaluate:run",
        version=4,
        params={
            "kind": kind,
            "kv": kv,
            "scorers": [scorer.params() for scorer in settings.scorers],
            **settings.model_dump(include={"max_new_tokens", "batch_size", "seed"}),
            **template,
            **trust(recipe, arm),
        },
        inputs=inputs,
        tools=(*readers(inputs["model"]), *scorer_packages(recipe)),
        after=after,
        gpus=1,
    )
