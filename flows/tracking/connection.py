"""The way to MLflow: a client, the experiment of a recipe's name, and what is said where MLflow refuses."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import Experiment, LifecycleStage, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from flows.mlflow_uri import no_answer, shown, tracking_uri
from flows.tracking.moved import ARTIFACTS, follow_home, left_behind
from recipes.problem import Problem
from recipes.secrets import hide
from tasks.runtime.store.local import flocked

WHOLE = "quench.whole"  # tag of a parent: nothing of the run is missing
REPLACED = "replaced"  # quench.kind of what was written anew and could not be deleted
LOCK = "mlflow.lock"
PAGE = 1000
NOT_KNOWN = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")


class Opened(NamedTuple):
    """An experiment that can be written to.

    Attributes:
        notes: What was put right before it could, in words for the run's log.
    """

    id: str
    notes: list[str]


def client(home: Path) -> MlflowClient:
    """A client that gives up after seconds, and says on the terminal only what we say."""
    # Two lines on every new database, and a page of traceback for what is raised, too, and kept as trouble.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `--json` has it to itself
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    with flocked(home / LOCK):  # two processes at once would both make the tables
        return MlflowClient(tracking_uri(home))


def open_experiment(mlflow: MlflowClient, home: Path, name: str) -> Opened:
    """The experiment of this name, made or restored where that is needed, with its files below this home.

    Raises:
        RecipeError: The user may not restore it; a home that was moved cannot be followed.
        MlflowException: MLflow does not answer, or refuses something else.
    """
    uri = tracking_uri(home)
    with flocked(home / LOCK):  # two runs at once would both make or restore it
        notes = follow_home(home)
        known = mlflow.get_experiment_by_name(name)
        if known is None:
            place = (home / ARTIFACTS / name).as_uri() if uri.startswith("sqlite:") else None
            try:
                return Opened(mlflow.create_experiment(name, artifact_location=place), notes)
            except MlflowException as error:
                known = mlflow.get_experiment_by_name(name)
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or known is None:
                    raise
                # another home made it in between
        if known.lifecycle_stage == LifecycleStage.DELETED:
            notes += _restored(mlflow, known, uri)
        if not uri.startswith("http") and left_behind(home, known.artifact_location):
            raise _gone(known, uri).error()
        if uri.startswith("http"):  # who may only read is told now, and not after the training
            mlflow.set_experiment_tag(known.experiment_id, "quench", "writes its runs here")
        return Opened(known.experiment_id, notes)


def _restored(mlflow: MlflowClient, known: Experiment, uri: str) -> list[str]:
    """Restore an experiment; MLflow takes nothing for one that was deleted.

    It comes back with all its runs, also with those that were written anew since: they are deleted again.

    Raises:
        RecipeError: This user may not.
    """
    command = f"mlflow experiments restore --experiment-id {known.experiment_id}"
    try:
        mlflow.restore_experiment(known.experiment_id)
    except MlflowException as error:
        raise Problem(
            what=f"the MLflow experiment {known.name} was deleted, and MLflow does not restore it for this user",
            where=shown(uri),
            why=hide(str(error).splitlines()[0]),
            next=f"let somebody who may run `MLFLOW_TRACKING_URI={shown(uri)} {command}`; or give the recipe another "
            "`name`, which is the experiment's",
        ).error() from None
    runs = _all_runs(mlflow, known.experiment_id, "tags.`quench.run` LIKE '%'")
    whole = {run.data.tags["quench.run"] for run in runs if WHOLE in run.data.tags}
    parents = [run for run in runs if run.data.tags.get("quench.kind") == "run" and WHOLE not in run.data.tags]
    doubles = {run.info.run_id for run in parents if run.data.tags["quench.run"] in whole}
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in doubles]
    remove(mlflow, [*nested, *(run for run in parents if run.info.run_id in doubles)])
    return [f"the MLflow experiment {known.name} was deleted: it is restored, with its runs"]


def _gone(known: Experiment, uri: str) -> Problem:
    at = f"MLFLOW_TRACKING_URI={shown(uri)} mlflow experiments"
    return Problem(
        what=f"the MLflow experiment {known.name} has its files in a folder that is gone",
        where=shown(uri),
        why=f"{known.artifact_location} is below a home that was moved or removed, and this database is not of this "
        "home, so nobody changes its paths",
        next="put that folder back; or let the experiment keep what is left under another name and run again: "
        f"`{at} rename --experiment-id {known.experiment_id} --new-name {known.name}-old`",
    )


def runs_of(mlflow: MlflowClient, experiment: str, run: str) -> list[Run]:
    """What MLflow has of a run of ours: the parent and the nested ones."""
    runs = _all_runs(mlflow, experiment, f"tags.`quench.run` = '{run}'")
    return [entry for entry in runs if entry.data.tags.get("quench.kind") != REPLACED]


def _all_runs(mlflow: MlflowClient, experiment: str, text: str) -> list[Run]:
    runs: list[Run] = []
    token = None
    while True:
        page = mlflow.search_runs([experiment], text, ViewType.ACTIVE_ONLY, max_results=PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def remove(mlflow: MlflowClient, runs: Sequence[Run]) -> None:
    """Delete runs that are written anew; mark them where the user may write and not delete.

    Raises:
        MlflowException: Neither is allowed.
    """
    for run in runs:
        try:
            mlflow.delete_run(run.info.run_id)
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED":
                raise
            mlflow.set_tag(run.info.run_id, "quench.kind", REPLACED)
            if WHOLE in run.data.tags:
                mlflow.delete_tag(run.info.run_id, WHOLE)
            mlflow.update_run(run.info.run_id, name=f"{run.info.run_name} (replaced)")


def refused(uri: str, error: MlflowException) -> Problem:
    """What an exception of MLflow means to whoever started the run."""
    why = hide(str(error).splitlines()[0])
    if error.error_code in NOT_KNOWN:
        return Problem(
            what="MLflow does not know this user",
            where=shown(uri),
            why=why,
            next="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what that "
            "server takes",
        )
    if error.error_code == "PERMISSION_DENIED":
        return Problem(
            what="MLflow does not let this user do that",
            where=shown(uri),
            why=why,
            next="ask for the permission to edit the experiment (its name is the recipe's `name`), or give the recipe "
            "another name",
        )
    return no_answer(uri, why)
