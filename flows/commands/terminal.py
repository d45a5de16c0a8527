"""How commands speak: output on stdout as text or JSON, remarks on stderr, and an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.report.inert import visible
from recipes.problem import Problem

if TYPE_CHECKING:  # `quench check` is quick
    from rich.console import Console

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a command answers on stdout, and its exit code.

    Attributes:
        json: For a program (`--json`); None where stderr has said it all.
        text: For a person: the lines, or what prints them to a terminal; empty where stderr has said it all.
        code: Exit code.
    """

    json: Any
    text: str | Callable[[Console], None]
    code: int = DONE

    def print(self, *, as_json: bool) -> None:
        """Print one of the two on stdout."""
        if as_json:
            if self.json is not None:
                print(json.dumps(self.json, indent=2, default=str))
        elif callable(self.text):
            from flows.report.console import TextConsole

            self.text(TextConsole())
        elif self.text:
            print(visible(self.text))


def refusal(problems: Sequence[Problem], **more: Any) -> dict[str, Any]:
    """What `--json` prints where something is wrong."""
    return {"ok": False, "problems": [problem.as_dict() for problem in problems], **more}


def say(text: str) -> None:
    """Print a remark on stderr."""
    print(visible(text), file=sys.stderr)


def warn(problems: Sequence[Problem]) -> None:
    """Print what is doubtful and stops nothing."""
    for problem in problems:
        say(f"warning: {problem}\n")
