"""How many documents an lm-eval entry asks, as far as its YAML files and data files here tell: nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.checks.gate import document_problem
from recipes.checks.lm_eval_tasks import find_tasks, task_of
from recipes.data.files import raw_rows
from recipes.plain import is_list, is_mapping
from recipes.problem import Problem
from recipes.read.load import Loaded
from recipes.scorers import LmEvalSpec

LOCAL = ("json", "csv", "parquet", "arrow", "text")  # `dataset_path` of a task whose documents are in files


def document_warnings(loaded: Loaded) -> Iterator[Problem]:
    """Entries with so few documents that no candidate that is only equal passes. Rehearse counts where this cannot."""
    for number, scorer in enumerate(loaded.recipe.evaluate.scorers):
        if isinstance(scorer, LmEvalSpec) and (most := documents_at_most(scorer, loaded.content(scorer))) is not None:
            field = f"evaluate.scorers.{number}.tasks"
            problem = document_problem(f"task.{scorer.called}", most, loaded.recipe.gate.task, where=field)
            yield from filter(None, [problem])


def documents_at_most(scorer: LmEvalSpec, include: Path | None) -> int | None:
    """How many documents an entry asks at most; None where only loading its data sets tells.

    `limit` is for each task. A function of the task (`process_docs`) may leave documents out.
    """
    if scorer.limit is None and include is None:
        return None  # those that come with lm_eval have their documents on a hub
    if include is not None and not include.is_dir():
        return None
    total = 0
    found = find_tasks(scorer.tasks, include).files
    for name in scorer.tasks:
        tasks = [task_of(path) for path in found.get(name, ())]
        if not tasks or not all(isinstance(task.get("task"), str) for task in tasks):
            return None  # a group names tasks that are elsewhere
        for path, task in zip(found[name], tasks, strict=True):
            counts = [count for count in (scorer.limit, _in_files(task, path.parent, include)) if count is not None]
            if not counts:
                return None
            total += min(counts)
    return total


def _in_files(task: Mapping[str, Any], folder: Path, include: Path | None) -> int | None:
    """Rows of the files that a task takes its documents from; None where they are not in files here."""
    named = task.get("dataset_kwargs")
    files: Any = named.get("data_files") if is_mapping(named) else None
    if task.get("dataset_path") not in LOCAL or files is None:
        return None
    split = str(task.get("test_split") or task.get("validation_split"))
    if not is_mapping(files):
        files = {"train": files}  # as `datasets` calls what has no name
    chosen = files.get(split)
    paths = [(include or folder) / str(path) for path in (chosen if is_list(chosen) else [chosen] if chosen else [])]
    if not paths or not all(path.is_file() for path in paths):
        return None
    return sum(row.values is not None for path in paths for row in raw_rows(path))
