"""`quench track sync`: MLflow again from the runs' records, its registry from the promotions."""

from __future__ import annotations

import argparse

from flows.commands.terminal import DONE, FAILED, Output, say
from flows.promotion import registry
from flows.promotion.journal import Journal, locked, models
from flows.tracking.moved import follow_home
from flows.tracking.sync import sync
from tasks.runtime.store.home import open_home
from tasks.runtime.store.local import find_home


def command(args: argparse.Namespace) -> Output:
    """Write every run that MLflow does not have whole, and what the registry lacks of the promotions.

    Raises:
        RecipeError: MLflow does not answer, or refuses something.
    """
    home = find_home()
    open_home(home)
    for note in follow_home(home):
        say(note)
    written = sync(home, say)
    trouble: list[str] = []
    with locked(home):
        for model in models(home):
            trouble += registry.sync(home, model, Journal(home, model).lines())
    for line in trouble:
        say(f"MLflow is behind promotions.jsonl: {line}")
    return Output(
        json={"written": written, "trouble": trouble},
        text=f"{len(written)} runs written",
        code=FAILED if trouble else DONE,
    )
