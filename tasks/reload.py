"""reload: a copy of an arm, loaded in plain transformers and compared with the original."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.runtime.step import External, Step


def step(arm: str, *, kind: str, inputs: Mapping[str, External]) -> Step:
    """Inputs: model and copy; adapter where one is on top."""
    return Step(
        stage="reload",
        slug=arm,
        entry="tasks.jobs.reload:run",
        version=1,
        params={"kind": kind},
        inputs=dict(inputs),
        gpus=1,
    )
