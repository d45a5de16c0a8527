"""The scorers on the data's own answers, and what leaks: what would fail in every arm fails before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.doubles.search import leak_problem
from tasks.jobs.measuring.grading import Prompting, open_graders, refuse_decoded, refuse_long, refuse_references
from tasks.jobs.measuring.teacher_forcing import read_rows
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def run(job: Job) -> dict[str, Any]:
    """Open all scorers, and score every reference answer of dev and test by itself: its text, and that of its tokens.

    Reads:
        dataset. scorer-N: what entry N of the scorers reads.
    Writes:
        Nothing: the result says how many answers and documents there are, and how long the longest answer is.
    Metrics:
        None.

    Raises:
        StageError: More of train leaks into dev and test than is allowed; a scorer cannot be loaded or rejects a
            reference answer, as it is or as the tokenizer gives it back; one has more tokens than are decoded; an
            lm-eval task is not on this machine.
    """
    dataset = job.inputs["dataset"].path
    _refuse_leaks(dataset, job)
    graders = open_graders(job)
    prompted = [row for row in read_rows(dataset, "dev", "test") if row.prompt_ids]
    prompting = Prompting.of(dataset / "tokenizer")
    refuse_references(prompted, graders.answers, prompting)
    longest = refuse_long(prompted, prompting, max_new_tokens=job.params["max_new_tokens"])
    refuse_decoded(prompted, graders.answers, prompting)
    documents = {metric: harness.documents for metric, harness in graders.harnesses.items()}
    scorers = ", ".join(grader.name for grader in graders.answers)
    tasks = ", ".join(f"{n} documents of {task}" for by_task in documents.values() for task, n in by_task.items())
    job.events.note("scorers", f"{scorers} accept all {len(prompted)} reference answers{'; ' if tasks else ''}{tasks}")
    return {"references": len(prompted), "longest_tokens": longest, "documents": documents}


def _refuse_leaks(dataset: Path, job: Job) -> None:
    """Prepare has counted them, unless the recipe says not to."""
    leaks = json.loads((dataset / "summary.json").read_text(encoding="utf-8")).get("leaks")
    if leaks is None:
        return
    problem = leak_problem(
        leaks, most=job.params["max_near_duplicates"], examples=leaks["examples"], group=job.params["group"]
    )
    if problem:
        raise StageError(problem)
