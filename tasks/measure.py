"""measure: one arm, alone on the machine -> load time and tokens/s. Its identity holds the hardware."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.schema import Recipe
from tasks.arm import readers, trust
from tasks.runtime.step import External, Step, hardware


def step(
    recipe: Recipe, arm: str, *, kind: str, device: str, threads: int, inputs: Mapping[str, Step | External]
) -> Step:
    """Speed of an arm. `inputs` has model, dataset and, where the arm has one, adapter."""
    return Step(
        stage="measure",
        slug=arm,
        entry="tasks.jobs.measure:run",
        version=1,
        params={
            "kind": kind,
            **recipe.measure.model_dump(include={"batch", "prompt_tokens", "new_tokens", "repeats"}),
            **trust(recipe, arm),
            "hardware": {**hardware(), "device": device, "threads": threads},
        },
        inputs=inputs,
        tools=readers(inputs["model"]),
        whole_machine=True,
        gpus=1,
    )
