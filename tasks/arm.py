"""What the steps of an arm share: the tools that load and score its model, and whether the model's own code may run."""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.runtime.step import External, Step

READERS = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel")
SCORER_PACKAGES = {"json-schema": "jsonschema", "lm-eval": "lm-eval"}  # kind -> package that decides its scores


def readers(model: Step | External) -> tuple[str, ...]:
    """What loads an arm's model in the main environment and shapes its logits, by who made it.

    A model from elsewhere may be in any format; the base is unquantized.
    """
    foreign = isinstance(model, External) and model.name != "base"
    made_by = model.tools if isinstance(model, Step) else ()
    return (*READERS, "compressed-tensors") if foreign or "compressed-tensors" in made_by else READERS


def scorer_packages(recipe: Recipe) -> tuple[str, ...]:
    """Packages beside Quench that decide scores."""
    kinds = {scorer.kind for scorer in recipe.evaluate.scorers}
    return tuple(sorted(SCORER_PACKAGES[kind] for kind in kinds & SCORER_PACKAGES.keys()))


def trust(recipe: Recipe, arm: str) -> dict[str, bool]:
    """Parameter of an arm whose own code may run; of every other arm none, so that its identity stays."""
    external = recipe.evaluate.externals.get(arm)
    return {"trust_remote_code": True} if external and external.trust_remote_code else {}
