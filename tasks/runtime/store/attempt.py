"""Where one try at making a step works: in partial/, until its artifact is committed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at making a step, in its partial folder."""

    number: int
    folder: Path

    @property
    def own(self) -> Path:
        """attempt-N/: job.json, log.txt, result.json."""
        return self.folder / f"attempt-{self.number}"

    @property
    def files(self) -> Path:
        """What the job writes; empty at the start."""
        return self.folder / "files"

    @property
    def checkpoint(self) -> Path:
        """Kept over attempts of the same inputs; gone at commit."""
        return self.folder / "checkpoint"
