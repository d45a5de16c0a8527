"""`quench report`: render a run's report again from its manifests, and print it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from flows.commands.terminal import DONE, Output
from flows.report.build import print_report, render
from flows.run.folder import find_run
from tasks.runtime.store.local import find_home, read_json


def command(args: argparse.Namespace) -> Output:
    """Print the report and where its page lies.

    Raises:
        RecipeError: No such run.
    """
    home = find_home()
    folder = find_run(home, args.run)
    render(folder, home)
    return report_of(folder, below=f"  {folder / 'report.html'}")


def report_of(folder: Path, *, below: str, code: int = DONE) -> Output:
    """A run's report; on a terminal with some lines below it."""
    report = read_json(folder / "report.json")

    def show(console: Console) -> None:
        print_report(report, console)
        print(below)

    return Output(json=report, text=show, code=code)
