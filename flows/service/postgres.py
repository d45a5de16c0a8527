"""`quench up --postgres URL`: one database for Prefect and MLflow; MLflow has the schema `mlflow`.

Both keep a table alembic_version, so one schema would not do.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import psycopg2

from recipes.problem import Problem

SCHEMA = "mlflow"
CONNECT_S = 10


class Stores(NamedTuple):
    """Connection URLs; with the password, so they travel in the environment of the servers alone."""

    prefect: str
    mlflow: str


def stores(url: str) -> Stores:
    """Connect once, make MLflow's schema, and say what each server takes.

    Raises:
        RecipeError: No URL of PostgreSQL, or nothing answers there.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres") or not parts.path.strip("/"):
        raise _problem("that is no URL of a PostgreSQL database", "it is not understood").error()
    try:
        database = psycopg2.connect(url, connect_timeout=CONNECT_S)
    except psycopg2.Error as error:
        raise _problem(f"no PostgreSQL at {parts.hostname}", str(error).splitlines()[0]).error() from None
    try:
        with database, database.cursor() as cursor:
            cursor.execute(f"create schema if not exists {SCHEMA}")
    except psycopg2.Error as error:
        raise _problem(f"no schema {SCHEMA} can be made", str(error).splitlines()[0]).error() from None
    finally:
        database.close()
    query = "&".join(filter(None, [parts.query, f"options=-csearch_path%3D{SCHEMA}"]))
    return Stores(
        prefect=urlunsplit(parts._replace(scheme="postgresql+asyncpg")),
        mlflow=urlunsplit(parts._replace(scheme="postgresql+psycopg2", query=query)),
    )


def _problem(what: str, why: str) -> Problem:
    return Problem(
        what=what, where="--postgres", why=why, next="write --postgres postgresql://USER:PASSWORD@HOST/DATABASE"
    )
