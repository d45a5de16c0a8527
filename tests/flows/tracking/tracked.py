"""A home with a run that is small and was written by hand: what `quench track sync` reads, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.flows.synthetic_run import SHAPES, SyntheticRun, dump

ADAPTER = b"weights of the adapter"


def write_run(
    home: Path, *, run: str = "20261130-120000-quickstart-ab12", recipe: Mapping[str, Any] = {}, status: str = "stopped"
) -> Path:
    """A run with two arms and a trained adapter; returns its folder.

    Args:
        home: QUENCH_HOME.
        run: Its id.
        recipe: More of the resolved recipe.
        status: How it ended; a report takes seconds, and one that was stopped has none.
    """
    shapes = {name: SHAPES[name] for name in ("base", "nf4-adapter")}
    written = SyntheticRun(home, shapes=shapes, test=20, general=10, run_id=run, salt=run, measured=False)
    folder = written.write()
    steps = json.loads((folder / "steps.json").read_text())
    # A synthetic prepare step has no rows to name: MLflow's data sets come from real runs.
    steps["steps"] = [step for step in steps["steps"] if step["stage"] not in ("prepare", "calibrate")]
    dump(folder / "steps.json", {**steps, "recipe": "recipe.yaml", "status": status})
    resolved = json.loads((folder / "recipe.resolved.json").read_text())
    dump(folder / "recipe.resolved.json", {**resolved, **recipe})
    (trained,) = [step["path"] for step in steps["steps"] if step["stage"] == "train"]
    (home / trained / "files" / "adapter_model.safetensors").write_bytes(ADAPTER)
    return folder
