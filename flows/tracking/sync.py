"""`quench track sync`: MLflow again from the runs' records, for runs that it does not have whole.

A run that was killed, or whose MLflow was away, is written anew from runs/<id>/steps.json, manifests and events;
what is whole is left alone, so that sending twice adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flows.mlflow_uri import shown
from flows.plan.registered import read_registered, registered_tag
from flows.report.build import render
from flows.run.folder import is_under_way, run_files
from flows.tracking.tracker import Tracker
from recipes.problem import Problem, RecipeError
from tasks.runtime.store.local import read_json

REPORTED = ("completed", "failed")


def sync(home: Path, say: Callable[[str], None]) -> list[str]:
    """Write every run that MLflow does not have whole; returns their ids, oldest first.

    Raises:
        RecipeError: MLflow does not answer, or refuses something.
    """
    written: list[str] = []
    for folder in [path.parent for path in run_files(home, "steps.json")]:
        if is_under_way(folder):
            say(f"under way  {folder.name}")
        elif sync_run(home, folder, say=say):
            say(f"written    {folder.name}")
            written.append(folder.name)
    return written


def sync_run(home: Path, folder: Path, *, say: Callable[[str], None]) -> Tracker | None:
    """Write one run that nobody works on, unless MLflow has it whole; returns what wrote it.

    Args:
        home: QUENCH_HOME.
        folder: The run's.
        say: Told what had to be put right before.

    Raises:
        RecipeError: MLflow does not answer, or refuses something.
    """
    raw = read_json(folder / "steps.json")
    tracker = Tracker(home, experiment=raw["name"], run=raw["id"])
    for note in tracker.notes:
        say(note)
    if not tracker.begin_again():
        return None
    tags = {"mlflow.source.name": raw["recipe"], **registered_tag(read_registered(folder))}
    tracker.start(read_json(folder / "recipe.resolved.json"), tags=tags)
    for record in raw["steps"]:
        tracker.step(record)
    if raw["status"] in REPORTED:
        report = render(folder, home)
        tracker.report(report.json, folder, pictures=report.pictures)
    tracker.end(raw["status"], hurry=False)
    if tracker.trouble:
        raise RecipeError([_not_taken(tracker, folder, why) for why in dict.fromkeys(tracker.trouble)])
    return tracker


def _not_taken(tracker: Tracker, folder: Path, why: str) -> Problem:
    return Problem(
        what=f"MLflow does not take run {folder.name}",
        where=shown(tracker.uri),
        why=why,
        next="fix that and run `quench track sync` again: it writes what is not whole",
    )
