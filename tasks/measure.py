"""measure: load time and tokens/s of one arm, alone on the machine. Its identity holds the hardware."""

from __future__ import annotations

from recipes.schema import Recipe
from tasks.evaluate import trusted
from tasks.quantize import readers
from tasks.runtime.step import External, Step, hardware


def step(recipe: Recipe, arm: str, *, kind: str, device: str, threads: int, inputs: dict[str, Step | External]) -> Step:
    """Speed of an arm. `inputs` has model, dataset and, where the arm has one, adapter."""
    asked = recipe.measure
    return Step(
        stage="measure",
        slug=arm,
        entry="tasks.jobs.measure:run",
        version=1,
        params={
            "kind": kind,
            **asked.model_dump(include={"batch", "prompt_tokens", "new_tokens", "repeats"}),
            **trusted(recipe, arm),
            "hardware": {**hardware(), "device": device, "threads": threads},
        },
        inputs=inputs,
        tools=readers(inputs["model"]),
        whole_machine=True,
        gpus=1,
    )
