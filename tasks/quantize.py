"""quantize: model + calibset -> 4-bit model, one a scheme."""

from __future__ import annotations

from recipes.schema import Recipe
from recipes.schemes import Backend, Scheme
from tasks.runtime.step import External, Step

TOOLS: dict[Backend, tuple[str, ...]] = {
    "quench-rtn": ("torch", "transformers"),
    "gptqmodel": ("torch", "transformers", "gptqmodel"),
    "bitsandbytes": ("torch", "transformers", "bitsandbytes"),
    "llm-compressor": ("torch", "transformers", "llmcompressor", "compressed-tensors"),
    "autoawq": ("torch", "transformers", "autoawq"),
    "auto-gptq": ("torch", "transformers", "auto-gptq"),
}
ENVIRONMENTS: dict[Backend, str] = {  # the others run in the main one
    "llm-compressor": "llmcompressor",
    "autoawq": "autoawq",
    "auto-gptq": "autogptq",
}


def step(recipe: Recipe, scheme: Scheme, *, model: Step | External, calibset: Step, arm: str) -> Step:
    """One quantized model. RTN reads no calibration set, so none is an input."""
    inputs: dict[str, Step | External] = {"model": model}
    if scheme.needs_calibration:
        inputs["calibset"] = calibset
    own = {"damp": recipe.quantize.damp} if scheme.method == "gptq" else {}
    return Step(
        stage="quantize",
        slug=arm,
        entry="tasks.jobs.quantize:run",
        version=3,
        params={**scheme.params(), **own, "seed": recipe.quantize.seed},
        inputs=inputs,
        tools=TOOLS[scheme.backend],
        gpus=1,
        environment=ENVIRONMENTS.get(scheme.backend),
    )


def readers(model: Step | External) -> tuple[str, ...]:
    """What loads an arm's model in the main environment and shapes its logits, by who made it."""
    own = model.tools if isinstance(model, Step) else ()
    every = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel")
    return (*every, "compressed-tensors") if "compressed-tensors" in own else every
