"""`quench track sync`: MLflow again from the runs' records."""

from __future__ import annotations

import argparse

from flows.commands.terminal import Output, say
from flows.tracking.sync import sync
from tasks.runtime.store.home import open_home
from tasks.runtime.store.local import find_home


def command(args: argparse.Namespace) -> Output:
    """Write every run that MLflow does not have whole.

    Raises:
        RecipeError: MLflow does not answer, or refuses something.
    """
    home = find_home()
    open_home(home)
    written = sync(home, say)
    return Output(json={"written": written}, text=f"{len(written)} runs written")
