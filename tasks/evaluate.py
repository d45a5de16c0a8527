"""evaluate: one arm, loaded from its stored artifact in a fresh process -> scores, a row a row and metric."""

from __future__ import annotations

from recipes.arms import KV
from recipes.schema import Recipe
from tasks.quantize import readers
from tasks.rehearse import packages
from tasks.runtime.step import External, Step


def trusted(recipe: Recipe, arm: str) -> dict[str, bool]:
    """Parameter of an arm whose own code may run; none of any other one, so that their identities stay."""
    external = recipe.evaluate.externals.get(arm)
    return {"trust_remote_code": True} if external and external.trust_remote_code else {}


def step(
    recipe: Recipe,
    arm: str,
    *,
    kind: str,
    inputs: dict[str, Step | External],
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
        after: What has to be found right before.
    """
    asked = recipe.evaluate
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
            "scorers": [one.params() for one in asked.scorers],
            **asked.model_dump(include={"max_new_tokens", "batch_size", "seed"}),
            **({"chat_template": template} if template else {}),
            **trusted(recipe, arm),
        },
        inputs=inputs,
        tools=(*readers(inputs["model"]), *packages(recipe)),
        after=after,
        gpus=1,
    )
