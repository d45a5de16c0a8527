"""A home that was moved or renamed: MLflow's database keeps whole paths of files, and they follow it here.

MLflow has no call that changes the place of an experiment, a run or a model version. This is its own database below
QUENCH_HOME, or the one of `quench up`, so the columns are changed: ids, notes and the registry's numbers stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from flows.mlflow_uri import DATABASE, own_database, tracking_uri
from recipes.problem import Problem
from recipes.secrets import hide

ARTIFACTS = "mlartifacts"  # below QUENCH_HOME: the files of every experiment
WAIT_S = 20  # for another writer of SQLite, as MLflow itself waits
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


class _Place(NamedTuple):
    """A home by the two spellings that MLflow has of it."""

    uri: str
    path: str


def follow_home(home: Path) -> list[str]:
    """`follow` for the database below QUENCH_HOME, where runs are written to it.

    Raises:
        RecipeError: The database cannot be written.
    """
    own = own_database(home)
    return follow(home, own) if tracking_uri(home) == own else []


def follow(home: Path, database: str) -> list[str]:
    """Let MLflow's database name the files where they are now, below this home; does nothing where it does so already.

    Args:
        home: QUENCH_HOME.
        database: Its address, for SQLAlchemy.

    Returns:
        From where to where paths were changed, in words.

    Raises:
        RecipeError: The database cannot be written.
    """
    if database == own_database(home) and not (home / DATABASE).is_file():
        return []
    now = _Place((home / ARTIFACTS).as_uri(), str(home))
    waits = {"timeout": WAIT_S} if database.startswith("sqlite:") else {}
    engine = create_engine(database, connect_args=waits)
    try:
        with engine.begin() as connection:
            if not inspect(connection).has_table("experiments"):
                return []
            before = _places(connection, now)
            for place in before:
                _rewrite(connection, place, now)
    except SQLAlchemyError as error:
        raise Problem(
            what="MLflow's database still has the paths of a home that was moved, and cannot be changed",
            where=hide(database),
            why=hide(str(error).splitlines()[0]),
            next="end what else writes to it, and run the same command again",
        ).error() from None
    finally:
        engine.dispose()
    return [f"this home was at {place.path}: MLflow's paths are now those below {now.path}" for place in before]


def left_behind(home: Path, location: str | None) -> bool:
    """True where an experiment has its files below a home that is not this one, and is there no more.

    Of a database that is not below QUENCH_HOME: others may use it too, so its paths are theirs to change.
    """
    root, _, _ = (location or "").rpartition("/")
    if not root.startswith("file:") or not root.endswith(f"/{ARTIFACTS}") or root == (home / ARTIFACTS).as_uri():
        return False
    return not Path(unquote(urlsplit(root).path)).parent.is_dir()


def _places(connection: Connection, now: _Place) -> list[_Place]:
    """Homes that experiments have their files in, other than this one.

    An experiment of ours has the folder of its name, one of MLflow's server that of its number. Whatever else a user
    put elsewhere stays there.
    """
    rows = connection.execute(text("SELECT experiment_id, name, artifact_location FROM experiments"))
    uris: list[str] = []
    for number, name, location in rows:
        root, _, folder = (location or "").rpartition("/")
        if root.startswith("file:") and root.endswith(f"/{ARTIFACTS}") and unquote(folder) in (str(number), name):
            uris.append(root)
    others = [uri for uri in dict.fromkeys(uris) if uri != now.uri]
    return [_Place(uri, unquote(urlsplit(uri).path).removesuffix(f"/{ARTIFACTS}")) for uri in others]


def _rewrite(connection: Connection, before: _Place, now: _Place) -> None:
    for table, column in COLUMNS:
        connection.execute(
            text(
                f"UPDATE {table} SET {column} = :now || substr({column}, :start) "
                f"WHERE substr({column}, 1, :length) = :before"
            ),
            {
                "now": f"{now.uri}/",
                "before": f"{before.uri}/",
                "length": len(before.uri) + 1,
                "start": len(before.uri) + 2,
            },
        )
    # The source of a data set is JSON: {"uri": "/home/store/..."}
    connection.execute(
        text("UPDATE datasets SET dataset_source = replace(dataset_source, :before, :now)"),
        {"before": _in_json(before.path), "now": _in_json(now.path)},
    )


def _in_json(path: str) -> str:
    return f'"uri": {json.dumps(f"{path}/store/")[:-1]}'
