"""One step whose artifact goes to a user's folder instead of the store: same child, same checks, same manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.runtime.step import Context, Step, run_step
from tasks.runtime.store.local import MANIFEST, Artifact, Store, read_json


def work_folder(out: Path) -> Path:
    """Where the work for `out` is done: hidden, beside it, on the same file system, so that a rename publishes it."""
    return out.with_name(f".{out.name}.quench")


def make_folder(step: Step, inputs: Mapping[str, Artifact], context: Context, *, out: Path) -> dict[str, Any]:
    """Run a step in a store of its own, then rename its files, manifest.json among them, to `out`.

    Until then nothing is visible at `out`, which must not exist or be empty. After a failure the work folder holds
    the log and no weights.

    Returns:
        The manifest.

    Raises:
        StepFailed: As of run_step.
        InterruptedError: The run was stopped.
    """
    work = work_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        artifact = run_step(step, inputs, replace(context, store=Store(work))).artifact
        assert artifact.folder is not None  # run_step returns what it committed
        (artifact.folder / MANIFEST).rename(artifact.path / MANIFEST)
        if out.exists():
            out.rmdir()
        artifact.path.rename(out)
    finally:
        for files in work.glob("partial/*/*/files"):
            shutil.rmtree(files, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    return read_json(out / MANIFEST)
