"""The scorers on the data's own answers: what would fail in every arm's evaluation fails before training."""

from __future__ import annotations

from typing import Any

from tasks.jobs.measuring.grading import open_graders, refuse_references
from tasks.jobs.measuring.teacher_forcing import read_rows
from tasks.runtime.process.job import Job


def run(job: Job) -> dict[str, Any]:
    """Open all scorers, and score every reference answer of dev and test by itself.

    Reads:
        dataset. scorer-N: what entry N of the scorers reads.
    Writes:
        Nothing: the result says how many answers and documents there are.
    Metrics:
        None.

    Raises:
        StageError: A scorer cannot be loaded or rejects a reference answer; an lm-eval task is not on this machine.
    """
    graders = open_graders(job)
    prompted = [row for row in read_rows(job.inputs["dataset"].path, "dev", "test") if row.prompt_ids]
    refuse_references(prompted, graders.answers)
    documents = {metric: harness.documents for metric, harness in graders.harnesses.items()}
    scorers = ", ".join(grader.name for grader in graders.answers)
    tasks = ", ".join(f"{n} documents of {task}" for by_task in documents.values() for task, n in by_task.items())
    job.events.note("scorers", f"{scorers} accept all {len(prompted)} reference answers{'; ' if tasks else ''}{tasks}")
    return {"references": len(prompted), "documents": documents}
