"""quantize: model + calibset -> 4-bit model, one a scheme."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.schema import Recipe
from recipes.schemes.scheme import Backend, Scheme
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
        scheme: How.
        model: What is quantized.
        calibset: The calibration set.
        arm: Slug of the arm.
        scales_from: Model on which AWQ's scales and clipping are searched, where it is another one.
    """
    inputs: dict[str, Step | External] = {"model": model}
    if scales_from is not None:
        inputs["scales_from"] = scales_from
    if scheme.needs_calibration:
        inputs["calibset"] = calibset
    return alone(arm, scheme, inputs=inputs, damp=recipe.quantize.damp, seed=recipe.quantize.seed)


def alone(
    slug: str, scheme: Scheme, *, inputs: Mapping[str, Step | External], damp: float = 0.05, seed: int = 0
) -> Step:
    """The same without a recipe, and with its defaults. Inputs: model; calibset where the scheme needs one."""
    own = {"damp": damp} if scheme.method == "gptq" else {}
    return Step(
        stage="quantize",
        slug=slug,
        entry="tasks.jobs.quantize:run",
        version=4,
        params={**scheme.params(), **own, "seed": seed},
        inputs=inputs,
        tools=TOOLS[scheme.backend],
        gpus=0 if scheme.backend == "quench-rtn" else 1,  # rounding waits for the disk
        environment=ENVIRONMENTS.get(scheme.backend),
    )


def readers(model: Step | External) -> tuple[str, ...]:
    """What loads an arm's model in the main environment and shapes its logits, by who made it.

    A model from elsewhere may be in any format; the base is unquantized.
    """
    foreign = isinstance(model, External) and model.name != "base"
    own = model.tools if isinstance(model, Step) else ()
    every = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel")
    return (*every, "compressed-tensors") if foreign or "compressed-tensors" in own else every
