"""`quench debug STEP [--run RUN] [--go | --pdb]`: the one line that repeats a step's job, or the job itself, here.

The job runs in QUENCH_HOME/debug/, on a copy of its job.json; the run and the store stay as they are. It takes no
lease: it runs beside whatever runs now.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from flows.commands.terminal import Output, say
from flows.run.folder import find_run
from recipes.problem import Problem, RecipeError
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.repeat import JOB, Repeat, repeat_of
from tasks.runtime.store.local import MANIFEST, find_home, read_json


@dataclass(frozen=True, kw_only=True)
class Attempted:
    """A try at a step that can be repeated.

    Attributes:
        step: `stage/slug`.
        folder: Its folder, with job.json and log.txt.
        run: The run's id; None where the folder itself was named.
        problem: What the run says went wrong; None where nothing did.
    """

    step: str
    folder: Path
    run: str | None = None
    problem: Mapping[str, str] | None = None


def command(args: argparse.Namespace) -> Output:
    """Print the line; with --go or --pdb become the job.

    Raises:
        RecipeError: No such step, nothing of it is left, or its inputs are gone.
    """
    home = find_home()
    attempted = find_attempt(home, args.step, args.run)
    repeat = repeated(home, attempted)
    if args.pdb and repeat.job.execution.processes > 1:
        raise _many_ranks(attempted, repeat).error()
    repeat.prepare(attempted.folder)
    if args.go or args.pdb:
        _become(repeat, debugger=args.pdb)
    return Output(json=_told(attempted, repeat), text="\n".join(_lines(attempted, repeat)))


def _become(repeat: Repeat, *, debugger: bool) -> NoReturn:
    """Replace this process by the job: it has the terminal, so that breakpoint() can read from it."""
    say(f"{repeat.job.stage}/{repeat.job.slug} in {repeat.folder}; the store is not touched")
    sys.stdout.flush()
    os.chdir(repeat.folder)
    words = repeat.argv(debugger=debugger)
    os.execve(words[0], words, dict(repeat.env))


def repeated(home: Path, attempted: Attempted) -> Repeat:
    """The job, to be repeated below the home.

    Raises:
        RecipeError: job.json is one of another version of Quench, or what it reads is gone.
    """
    made = attempted.folder.parent / MANIFEST
    environment = (read_json(made).get("environment") or {}).get("name") if made.is_file() else None
    into = home / "debug" / attempted.step.replace("/", "-")
    try:
        repeat = repeat_of(attempted.folder, into=into, environment=None if environment == "main" else environment)
    except StageError as error:
        raise error.problem.error() from None
    if problems := list(_gone(repeat, attempted)):
        raise RecipeError(problems)
    return repeat


def _gone(repeat: Repeat, attempted: Attempted) -> Iterator[Problem]:
    again = "quench run the recipe again: it makes what is missing, and this step."
    for name, read in repeat.job.inputs.items():
        if not read.path.exists():
            yield Problem(
                what=f"The input {name} of {attempted.step} is gone.",
                where=str(read.path),
                why="The job reads it: it was removed, or the home was moved since.",
                next=again,
            )
    if not repeat.python.exists():
        yield Problem(
            what=f"The Python that ran {attempted.step} is gone.",
            where=str(repeat.python),
            why="The environment was removed or moved since.",
            next=again,
        )


# ---- which attempt


def find_attempt(home: Path, word: str | None, run: str | None) -> Attempted:
    """The attempt that was named: by its folder, or by its step in a run; without a word the step that failed.

    Raises:
        RecipeError: There is none, or more than one.
    """
    named = Path(word) if word else None
    if named is not None and (folder := named.parent if named.name == JOB else named) and (folder / JOB).is_file():
        job = read_json(folder / JOB)
        return Attempted(step=f"{job['stage']}/{job['slug']}", folder=folder.resolve())
    folder = find_run(home, run)
    steps = {step["key"]: step for step in read_json(folder / "steps.json")["steps"]}
    step = _named(word, steps, folder)
    attempt = _attempt(home, step)
    if attempt is None:
        raise _no_attempt(step, folder).error()
    return Attempted(step=step["key"], folder=attempt, run=folder.name, problem=step.get("problem"))


def _named(word: str | None, steps: Mapping[str, Mapping[str, Any]], run: Path) -> Mapping[str, Any]:
    """A step by its key, by the end or the beginning of it, or the only one that failed."""
    if word is not None and word in steps:
        return steps[word]
    failed = [key for key, step in steps.items() if step["status"] == "failed"]
    keys = failed if word is None else [key for key in steps if word in key.split("/")]
    if len(keys) == 1:
        return steps[keys[0]]
    near = get_close_matches(word or "", [*steps], n=1, cutoff=0.5)
    if word is None:
        what = f"{len(failed)} steps of the run failed." if failed else "No step of the run failed."
    else:
        what = f"{len(keys)} steps of the run are called {word}." if keys else f"The run has no step {word}."
    raise Problem(
        what=what,
        where=str(run),
        why=f"It has {', '.join(keys or steps) or 'none'}.",
        next=f"quench debug {(keys or near or [*steps] or ['STEP'])[0]}, or another run: --run RUN",
    ).error()


def _attempt(home: Path, step: Mapping[str, Any]) -> Path | None:
    """Folder of a step's last attempt: where its log says, in partial/, or in the artifact that came of a later one."""
    if step.get("log") and (Path(step["log"]).parent / JOB).is_file():
        return Path(step["log"]).parent
    name = f"{step['stage']}/{step['slug']}-{step['fingerprint'][:12]}"
    made = [home / step["path"]] if step.get("path") else sorted((home / "store").glob(f"{name}*"))
    attempts = [path.parent for folder in (home / "partial" / name, *made) for path in folder.glob(f"attempt-*/{JOB}")]
    return max(attempts, key=lambda folder: int(folder.name.removeprefix("attempt-")), default=None)


def _no_attempt(step: Mapping[str, Any], run: Path) -> Problem:
    log, why = step.get("log"), (step.get("problem") or {}).get("why") or "The folder of its attempts was removed."
    started = f"Its log was {log}." if log and not log.startswith("none") else "No child was started for it."
    on = step.get("node") or {}
    other = f" It ran on {on['host']} ({on['address']}): type it there." if on else ""
    return Problem(
        what=f"Nothing of {step['key']} is left to repeat.",
        where=str(run),
        why=f"{started} {why}{other}",
        next="Name the step that failed first, or quench run the recipe again.",
    )


def _many_ranks(attempted: Attempted, repeat: Repeat) -> Problem:
    return Problem(
        what=f"{attempted.step} is done by {repeat.job.execution.processes} processes together.",
        where="--pdb",
        why="A terminal can be read by one of them only.",
        next="--go starts them all; attach to one by its process id (docs/operations.md), or run the recipe with "
        "--set run.processes=1.",
    )


# ---- what is said


def _told(attempted: Attempted, repeat: Repeat) -> dict[str, Any]:
    return {
        "step": attempted.step,
        "run": attempted.run,
        "problem": attempted.problem,
        "attempt": str(attempted.folder),
        "log": str(attempted.folder / "log.txt"),
        "folder": str(repeat.folder),
        "python": str(repeat.python),
        "argv": repeat.argv(),
        "env": dict(repeat.env),
        "env_kept": repeat.kept,
        "line": repeat.line,
    }


def _lines(attempted: Attempted, repeat: Repeat) -> Sequence[str]:
    name = attempted.step if attempted.run else str(attempted.folder)
    run = f" --run {attempted.run}" if attempted.run else ""
    head = [f"{attempted.step}" + (f" of run {attempted.run}" if attempted.run else "")]
    if attempted.problem:
        head.append(f"  failed: {attempted.problem['what']}")
    whose = "as the job had it, without secrets" if repeat.kept else "of this terminal: the attempt has no record of it"
    return [
        *head,
        f"  log:    {attempted.folder / 'log.txt'}",
        f"  job:    {repeat.folder / JOB} (a copy: change it as you like)",
        f"  env:    {whose}",
        "",
        repeat.line,
        "",
        f"quench debug {name}{run} --go     runs it in this terminal: breakpoint() works",
        f"quench debug {name}{run} --pdb    opens pdb where it raises",
    ]
