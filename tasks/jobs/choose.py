"""choose: name one of the candidates."""

from __future__ import annotations

import json
from typing import Any

from tasks.runtime.job import Job


def run(job: Job) -> dict[str, Any]:
    """Name the only candidate.

    Reads: one input a candidate.
    Writes: choice.json {"candidate": name of the input}.
    Raises: ValueError when there is more than one candidate: nothing here reads scores.
    """
    (candidate,) = job.inputs
    (job.out / "choice.json").write_text(json.dumps({"candidate": candidate}) + "\n", encoding="utf-8")
    job.events.note("choice", f"{candidate}: named by the recipe (merge.base)")
    return {"candidate": candidate}
