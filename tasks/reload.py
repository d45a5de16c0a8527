"""reload: an arm and a copy of it, loaded in plain transformers -> how they compare."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.runtime.step import External, Step


def step(arm: str, *, kind: str, inputs: Mapping[str, External]) -> Step:
    """The comparison. `inputs` has model, copy and, where one is on top, adapter."""
    return Step(
        stage="reload",
        slug=arm,
        entry="tasks.jobs.reload:run",
        version=1,
        params={"kind": kind},
        inputs=inputs,
        gpus=1,
    )
