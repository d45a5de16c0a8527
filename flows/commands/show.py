"""`quench show RECIPE`: rows as the model will see them, and which part of them is trained. Nothing is made."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from flows.commands.terminal import Output
from flows.pins import row_pins
from recipes.checks.check import check
from recipes.problem import Problem, RecipeError
from recipes.read.load import InvalidRecipe, Loaded, load
from tasks import prepare
from tasks.runtime.fingerprint import canonical
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.job import Execution, Input, Job
from tasks.runtime.process.launch import Launcher, child_env
from tasks.runtime.process.leases import cpu_slots
from tasks.runtime.step import External
from tasks.runtime.store.local import read_json

FILE = "shown.json"  # tasks/jobs/show.py writes it
TRAINED = "green"


def command(args: argparse.Namespace) -> Output:
    """Show rows.

    Raises:
        RecipeError: The recipe, or a row on the way to the last one that is shown, cannot be used.
        StepFailed: The child ended with an error of ours.
    """
    rows = show(args.recipe, row=args.row, split=args.split, count=args.count, sets=args.set)
    listed = [{name: value for name, value in row.items() if name != "parts"} for row in rows]
    return Output(json=listed, text=lambda console: _print(rows, console))


def show(
    path: Path, *, row: str | None = None, split: str = "train", count: int = 3, sets: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows that `quench show` prints, see `tasks.jobs.show`.

    Args:
        path: Recipe file.
        row: A row's name or its beginning, or its place, `rows.jsonl:17`.
        split: Side of the split; without `row`.
        count: Rows at most.
        sets: Overrides `a.b=c`.

    Raises:
        RecipeError: As of the command.
        StepFailed: As of the command.
    """
    loaded = load_checked(path, sets)
    folder = Path(tempfile.mkdtemp(prefix="quench-show-"))
    try:
        rows = _in_child(show_job(loaded, folder, row=row, split=split, count=count), folder)
    except StepFailed:
        raise  # its log stays
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def load_checked(path: Path, sets: Sequence[str] = ()) -> Loaded:
    """The recipe, checked as `quench check` does; Python that it names is not run, so it need not be allowed.

    Raises:
        RecipeError: With everything that is wrong.
    """
    problems: list[Problem] = []
    try:
        loaded: Loaded | None = load(path, sets=sets)
    except InvalidRecipe as error:
        problems, loaded = list(error.problems), error.rest
    problems += check(loaded, fetched=True) if loaded else []
    if problems or loaded is None:
        raise RecipeError(problems)
    return loaded


def show_job(loaded: Loaded, folder: Path, *, row: str | None = None, split: str = "train", count: int = 3) -> Job:
    """The job that reads and renders rows with the parameters of prepare; it writes below `folder`.

    Raises:
        RecipeError: A hub id cannot be fetched.
    """
    step = prepare.step(loaded.recipe, **row_pins(loaded)._asdict())
    inputs = {name: origin.path for name, origin in step.inputs.items() if isinstance(origin, External)}
    out = folder / "files"
    out.mkdir(parents=True)
    return Job(
        stage="show",
        slug=step.slug,
        fingerprint="",
        entry="tasks.jobs.show:run",
        params={**canonical(dict(step.params)), "show": {"row": row, "split": split, "count": count}},
        inputs={name: Input(path=path, digest="", fingerprint="") for name, path in inputs.items()},
        out=out,
        checkpoint=folder / "checkpoint",
        execution=Execution(threads=cpu_slots(), log_level=loaded.recipe.run.log_level),
    )


def _in_child(job: Job, folder: Path) -> list[dict[str, Any]]:
    """What the job wrote: in a process of its own, like every job, since only jobs import transformers.

    Raises:
        RecipeError: The job refuses the rows or the template.
        StepFailed: It ended otherwise.
    """
    path, log = folder / "job.json", folder / "log.txt"
    job.dump(path)
    with Launcher() as launcher:
        env = child_env(threads=job.execution.threads)
        code = launcher.start(["run", str(path)], env=env, cwd=folder, log=log).wait()
    answer = path.with_name("result.json")
    said: dict[str, Any] = read_json(answer) if answer.exists() else {"ok": False}
    if said["ok"]:
        return json.loads((job.out / FILE).read_text(encoding="utf-8"))
    if said.get("type") == "StageError":
        raise Problem(**said["problem"]).error()
    ended = {"what": f"the child ended with exit code {code}", "where": "quench show", "why": "it left no result"}
    problem = Problem(**said.get("problem", ended | {"next": "read the log"}))
    raise StepFailed("show", problem, log=str(log), returncode=code)


# ---- printing


def _print(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The trained part in colour, or between brackets where there is none."""
    coloured = console.is_terminal and not console.no_color
    for row in rows:
        for line in _head(row):
            console.print(line, style="bold" if coloured else None, markup=False, highlight=False, soft_wrap=True)
        console.print(_marked(row, coloured=coloured), soft_wrap=True)
        console.print()
    if rows:
        mark = "in green" if coloured else "between ⟦ and ⟧"
        console.print(f"What is trained is {mark}.", highlight=False)


def _head(row: Mapping[str, Any]) -> Iterator[str]:
    """Where the row is from, where it goes, how long it is, and what is missing of it."""
    words = [row["source"], f"row {row['row']}", row["split"], f"group {row['group']}"]
    yield "  ".join([*words, *([f"domain {row['domain']}"] if row["domain"] else [])])
    if row["left_out"]:
        yield f"  left out: {row['left_out']}"
    if row["input_ids"]:
        turn = f" (turn {row['turn']})" if row["turn"] else ""
        yield f"  {len(row['input_ids'])} tokens, {sum(row['trained'])} of them trained{turn}"
    if row["cut_tokens"]:
        cut = f"{row['cut_turns']} leading turns of" if row["cut_turns"] else "its end,"
        yield f"  cut by data.max_length: {cut} {row['cut_tokens']} tokens"
    if row["tools"]:
        yield f"  tools: {', '.join(tool['function']['name'] for tool in row['tools'])}"
    if row["not_used"]:
        yield f"  columns that nothing reads: {', '.join(row['not_used'])}"


def _marked(row: Mapping[str, Any], *, coloured: bool) -> Text:
    text = Text()
    for part, trained in row["parts"]:
        if coloured:
            text.append(part, style=TRAINED if trained else None)
        else:
            text.append(f"⟦{part}⟧" if trained else part)
    return text
