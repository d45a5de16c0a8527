"""What `quench serve` is asked for: an arm of a run, or the champion of a model; its files and the engine's words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flows.commands.arms import named_arm, unmade
from flows.commands.servable import Machine, folder_of, record_of, refused
from flows.promotion.champion import stale
from flows.promotion.journal import Journal, Promotion, champion, with_champion
from flows.reach import JOURNAL
from flows.results.read import Run, RunArm, read_run
from flows.run.folder import find_run
from recipes.problem import Problem
from tasks.runtime.store.local import Store, read_json

ALIAS = "@champion"
HELLO = [{"role": "user", "content": "Hello"}]
EXAMPLE_CHARS = 600  # of a row's prompt: a line that is pasted into a terminal should be seen whole there


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
        """What serve.json has for vLLM, under the name of the target."""
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
    if problem := unmade(run, arm) or _damaged(run, arm) or refused(run, arm, machine, named=named):
        raise problem.error()
    return Target(
        name=slug,
        shown=f"{slug} of run {run.raw['id']}",
        folder=folder_of(run, arm),
        record=record_of(run, arm),
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
        record = _own_record(folder, present, machine)
        options = ("--max-model-len", str(length)) if length else ()  # of two, vLLM takes the last
        return Target(name=name, shown=shown, folder=folder, record=record, options=options)
    run, remarks = _fitted(read_run(known, home), machine, length)
    arm = named_arm(run, present.arm)
    if problem := unmade(run, arm) or refused(run, arm, machine, named=[present.run]):
        raise problem.error()
    shown = f"{shown} ({arm.slug} of run {run.raw['id']})"
    record = record_of(run, arm)
    return Target(name=name, shown=shown, folder=folder, record=record, example=_example(run), remarks=remarks)


def _own_record(folder: Path, present: Promotion, machine: Machine) -> dict[str, Any]:
    path = folder / "serve.json"
    record = read_json(path) if path.is_file() else None
    if record is None or record["vllm"]["command"] is None:
        why = "serve.json has no command for vLLM"
    elif machine.device == "cpu" and machine.engine == "vllm" and record["scheme"] and not machine.avx512:
        why = "vLLM's kernel for 4-bit weights on a CPU is built for AVX-512 alone, which this CPU lacks"
    else:
        return record
    raise Problem(
        what=f"{present.arm}, version {present.version} of {present.model}, is not served here.",
        where=str(folder),
        why=f"Its run {present.run} is gone, and {why}.",
        next="Name an arm of a run that is there: quench serve RUN ARM",
    ).error()


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


def _damaged(run: Run, arm: RunArm) -> Problem | None:
    """Files that are missing or have another size; where the files are not of the store, nothing is known."""
    step = run.step(arm.model)
    if step is None or step.files is None or step.manifest is None:
        return None
    damage = Store(run.home).damage(step.files.parent, step.manifest)
    if damage is None:
        return None
    return Problem(
        what=f"The files of {arm.slug} are damaged: {damage}.",
        where=str(step.files),
        why="They are not what was evaluated.",
        next="quench run makes the artifact again.",
    )


def _no_champion(home: Path, name: str, alias: str) -> Problem:
    able = with_champion(home)
    if alias == ALIAS:
        what = f"{name} has no champion."
        why = f"Champions have {', '.join(able)}." if able else "Nothing was promoted on this QUENCH_HOME."
    else:
        what, why = f"There is no {alias}.", f"What ships is called {ALIAS}; earlier versions are not served by name."
    return Problem(
        what=what,
        where=str(home / JOURNAL),
        why=why,
        next=f"quench serve {able[-1]}{ALIAS}" if able else "quench promote, or name an arm: quench serve ARM",
    )


def _words_problem(words: Sequence[str]) -> Problem:
    return Problem(
        what=f"`quench serve {' '.join(words)}` is not [RUN] ARM.",
        where="quench serve",
        why="It takes an arm, and a run before it where it is not the latest; or NAME@champion.",
        next="Write for example: quench serve merged-dequantized",
    )
