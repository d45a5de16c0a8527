"""What a job says while it works: one JSON object per line, appended to events.jsonl inside its artifact.

The parent follows the file for progress bars and live MLflow curves; a later hit replays it. Kinds:

* `{"t", "kind": "metric", "name", "value", "step"}`
* `{"t", "kind": "progress", "done", "total", "unit", "note"}`
* `{"t", "kind": "note", "about", "text"}`: a decision or a fallback with its reason; shown in the report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Events:
    """Append-only event file of one artifact."""

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        self.path, self.silent = path, silent

    def _append(self, event: dict[str, Any]) -> None:
        if self.silent:
            return
        line = json.dumps({"t": round(time.time(), 3), **event}, allow_nan=True) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def metric(self, name: str, value: float, *, step: int = 0) -> None:
        """A point of a curve. `name` uses letters, digits and `_ - . / : ` (MLflow's rule)."""
        self._append({"kind": "metric", "name": name, "value": float(value), "step": int(step)})

    def progress(self, done: int, total: int, *, unit: str = "step", note: str = "") -> None:
        """How far the job is; anything longer than two seconds reports this."""
        self._append({"kind": "progress", "done": int(done), "total": int(total), "unit": unit, "note": note})

    def note(self, about: str, text: str) -> None:
        """A decision, a count or a fallback with its reason. Also printed, so that it stands in the log."""
        if not self.silent:
            print(f"{about}: {text}", flush=True)
        self._append({"kind": "note", "about": about, "text": text})


def read_events(path: Path, *, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (event, offset after it) for every complete line from `offset` bytes on; a half line waits."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset
