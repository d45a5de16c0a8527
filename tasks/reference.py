"""reference: logits of nf4-adapter, the model as it was trained, or of an external model, over dev and test."""

from __future__ import annotations

from typing import Any

from recipes.schema import Recipe
from tasks.evaluate import trusted
from tasks.quantize import readers
from tasks.runtime.step import External, Step


def step(recipe: Recipe, *, dataset: Step, base: External, adapter: Step) -> Step:
    """What every arm's KL and top-1 agreement are measured against."""
    return _step(recipe, {"dataset": dataset, "base": base, "adapter": adapter}, {})


def external(recipe: Recipe, *, dataset: Step, model: External) -> Step:
    """The same of an external model (evaluate.reference)."""
    own = trusted(recipe, model.name)
    return _step(recipe, {"dataset": dataset, "model": model}, {"kind": "external", **own})


def _step(recipe: Recipe, inputs: dict[str, Step | External], params: dict[str, Any]) -> Step:
    return Step(
        stage="reference",
        slug=recipe.name,
        entry="tasks.jobs.reference:run",
        version=1,
        params={**recipe.evaluate.model_dump(include={"batch_size", "reference_gib", "seed"}), **params},
        inputs=inputs,
        tools=("torch", "transformers", "peft", "bitsandbytes") if "base" in inputs else readers(inputs["model"]),
        gpus=1,
    )
