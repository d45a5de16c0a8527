"""quantize: model + calibset -> 4-bit model, one per scheme."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.schema import Recipe
from recipes.schemes.scheme import Backend, Scheme
from tasks.runtime.step import External, Step, present

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


def step(
    recipe: Recipe,
    scheme: Scheme,
    *,
    model: Step | External,
    calibset: Step,
    arm: str,
    scales_from: External | None = None,
) -> Step:
    """One quantized model. RTN reads no calibration set, so none is an input.

    Args:
        recipe: The recipe.
        scheme: How it is quantized.
        model: What is quantized.
        calibset: The calibration set.
        arm: Slug of the arm.
        scales_from: Model on which AWQ's scales and clipping are searched, where it is another one.
    """
    calibration = calibset if scheme.needs_calibration else None
    inputs = present(model=model, scales_from=scales_from, calibset=calibration)
    return alone(arm, scheme, inputs=inputs, damp=recipe.quantize.damp, seed=recipe.quantize.seed)


def alone(
    slug: str, scheme: Scheme, *, inputs: Mapping[str, Step | External], damp: float = 0.05, seed: int = 0
) -> Step:
    """The same without a recipe, and with its defaults. Inputs: model; calibset where the scheme needs one."""
    gptq = {"damp": damp} if scheme.method == "gptq" else {}
    return Step(
        stage="quantize",
        slug=slug,
        entry="tasks.jobs.quantize:run",
        version=5,
        params={**scheme.params(), **gptq, "seed": seed},
        inputs=inputs,
        tools=TOOLS[scheme.backend],
        gpus=0 if scheme.backend == "quench-rtn" else 1,  # rounding waits for the disk
        environment=ENVIRONMENTS.get(scheme.backend),
    )
