"""reference: nf4-adapter, the model as it was trained, or an external model -> its logits over dev and test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.schema import Recipe
from tasks.arm import readers, trust
from tasks.runtime.step import External, Step


def step(recipe: Recipe, *, dataset: Step, base: External, adapter: Step, device: str = "cpu") -> Step:
    """What every arm's KL and top-1 agreement are measured against; `device` is its kind, see `device_kind`."""
    tools = ("torch", "transformers", "peft", "bitsandbytes")
    inputs = {"dataset": dataset, "base": base, "adapter": adapter}
    return _step(recipe, inputs=inputs, tools=tools, params={"device": device})


def external(recipe: Recipe, *, dataset: Step, model: External, device: str = "cpu") -> Step:
    """The same of an external model (evaluate.reference)."""
    params = {"kind": "external", "device": device, **trust(recipe, model.name)}
    return _step(recipe, inputs={"dataset": dataset, "model": model}, tools=readers(model), params=params)


def _step(
    recipe: Recipe,
    *,
    inputs: Mapping[str, Step | External],
    tools: tuple[str, ...],
    params: Mapping[str, Any],
) -> Step:
    return Step(
        stage="reference",
        slug=recipe.name,
        entry="tasks.jobs.reference:run",
        version=2,
        params={**recipe.evaluate.model_dump(include={"batch_size", "reference_gib", "seed"}), **params},
        inputs=inputs,
        tools=tools,
        gpus=1,
    )
