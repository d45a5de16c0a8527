"""Which checkpoint a killed training resumes from: a whole one, made from the same inputs; and its best weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tasks.runtime.process.job import Job

BEST = "best.safetensors"


def last_checkpoint(job: Job) -> Path | None:
    """The last whole checkpoint that was made from these inputs; all others are removed, with a note."""
    job.checkpoint.mkdir(parents=True, exist_ok=True)
    digests = json.dumps({name: source.digest for name, source in sorted(job.inputs.items())})
    stamp = job.checkpoint / "inputs.json"
    same = stamp.exists() and stamp.read_text(encoding="utf-8") == digests
    checkpoints = sorted(job.checkpoint.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in checkpoints if same and _is_whole(path)]
    for path in checkpoints:
        if path not in whole:
            why = "its files are not whole" if same else "it was made from other inputs"
            job.events.note("checkpoint", f"{path.name} is left out: {why}")
            shutil.rmtree(path)
    stamp.write_text(digests, encoding="utf-8")
    if whole:
        job.events.note("checkpoint", f"resuming from {whole[-1].name}")
    return whole[-1] if whole else None


def best_weights(job: Job) -> Path:
    """The adapter's weights at the best dev loss so far. A checkpoint holds a hard link to those of its time."""
    return job.checkpoint / BEST


def restore_best(job: Job, checkpoint: Path | None) -> None:
    """The best weights as they were at `checkpoint`: later steps are trained and evaluated again."""
    best_weights(job).unlink(missing_ok=True)
    if checkpoint is not None and (checkpoint / BEST).exists():
        os.link(checkpoint / BEST, best_weights(job))


def link_best(job: Job, checkpoint: Path) -> None:
    """Hard-link the best weights so far into a checkpoint."""
    if best_weights(job).exists():
        os.link(best_weights(job), checkpoint / BEST)


def mark_whole(folder: Path) -> None:
    """List a finished checkpoint's files with their sizes, as its last file, atomically."""
    draft = folder / "whole.draft"
    draft.write_text(json.dumps(_sizes(folder)), encoding="utf-8")
    draft.replace(folder / "whole.json")


def _is_whole(folder: Path) -> bool:
    """All files have the sizes that were listed when the checkpoint was complete."""
    try:
        return json.loads((folder / "whole.json").read_text(encoding="utf-8")) == _sizes(folder)
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if not path.name.startswith("whole.")}
