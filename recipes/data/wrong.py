"""What is wrong with the rows of a source of any size: the first 20, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.data.rows import SHOWN, malformed
from recipes.problem import Problem


@dataclass(kw_only=True)
class Wrong:
    """Rows with something wrong.

    Attributes:
        lines: `file.jsonl:LINE what is wrong with it`, of the first 20.
        count: Of all.
    """

    lines: list[str] = field(default_factory=list[str])
    count: int = 0

    def add(self, line: str) -> None:
        """One more."""
        self.count += 1
        if self.count <= SHOWN:
            self.lines.append(line)

    def malformed(self, paths: Sequence[Path]) -> Problem:
        """Malformed rows as one problem; there has to be one."""
        return malformed(paths, self.lines, count=self.count)
