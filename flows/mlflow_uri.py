"""Where MLflow is, and whether it answers. Checked before a run starts anything, so MLflow is not imported."""

from __future__ import annotations

import os
import re
from pathlib import Path

import httpx

from recipes.problem import Problem
from tasks.runtime.store.local import read_json

DATABASE = "mlflow.db"  # below QUENCH_HOME
ANSWER_S = 10.0  # a refused connection answers at once, a busy server does not


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI, else the server of a `quench up --postgres`, else SQLite below QUENCH_HOME."""
    up = home / "up.json"
    known = os.environ.get("MLFLOW_TRACKING_URI") or (read_json(up).get("tracking") if up.exists() else None)
    return known or own_database(home)


def own_database(home: Path) -> str:
    """Address of the database below QUENCH_HOME."""
    return f"sqlite:///{home / DATABASE}"


def silent(uri: str) -> Problem | None:
    """The problem where no tracking server answers at an address; any answer will do, also one that refuses."""
    if not uri.startswith("http"):
        return None
    try:
        health = httpx.URL(f"{uri}/health").copy_with(username=None, password=None)
        httpx.get(health, timeout=ANSWER_S, verify=False)  # nothing secret is sent: whom it trusts is MLflow's matter
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return no_answer(uri, f"{type(error).__name__}: {error}")
    return None


def shown(uri: str) -> str:
    """An address without user, token and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def no_answer(uri: str, why: str) -> Problem:
    """MLflow does not answer."""
    return Problem(
        what="MLflow does not answer",
        where=shown(uri),
        why=why,
        next="start that server; or, for SQLite below QUENCH_HOME, unset MLFLOW_TRACKING_URI and remove the up.json "
        "that a killed `quench up` left",
    )
