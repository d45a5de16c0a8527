"""MLflow's own server, which takes artifacts through itself (its default); also with its basic-auth app."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import httpx

from flows.run.server import wait_for
from tasks.runtime.process.launch import Launcher, child_env
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import answers


@contextmanager
def mlflow_server(
    folder: Path, *more: str, database: str = "", port: int = 0, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run it on loopback while the body runs; gives its address. SQLite below `folder`, any port, if none is named."""
    url, log = f"http://127.0.0.1:{(port := port or free_port())}", folder / "log.txt"
    database = database or f"sqlite:///{folder}/other.db"
    words = ["server", "--workers", "1", "--port", str(port), "--backend-store-uri", database, *more]
    with Launcher() as launcher:
        child = launcher.start(
            ["exec", "--", str(Path(sys.executable).with_name("mlflow")), *words],
            env=child_env() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | dict(env or {}),
            cwd=folder,
            log=log,
        )
        wait_for(lambda: answers(url), "MLflow", at=url, child=child, log=log)
        yield url


ADMIN = ("admin", "the-admins-own-password")
USER = ("ann", "the-users-own-password")
TOKEN = "a-token-that-stands-for-ann"
# What mlflow[auth] adds to mlflow: it guards the form by which a browser makes users, which no test opens.
CSRF = """
    class CSRFProtect:
        def init_app(self, app): ...
        def protect(self): ...
"""
# basic-auth knows no tokens: a managed service has a function like this one, named in the configuration.
BEARER = f"""
    from flask import request
    from mlflow.server.auth import authenticate_request_basic_auth, make_basic_auth_response
    from werkzeug.datastructures import Authorization

    def authenticate():
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer":
            return authenticate_request_basic_auth()
        known = Authorization("basic", {{"username": "{USER[0]}"}})
        return known if token == "{TOKEN}" else make_basic_auth_response()
"""


@contextmanager
def auth_server(folder: Path) -> Iterator[str]:
    """MLflow with the basic-auth app, ADMIN, and USER, whom TOKEN stands for, too.

    USER owns what it makes, and reads what others made unless ADMIN grants more.
    """
    modules = {"quench_bearer.py": BEARER}
    if importlib.util.find_spec("flask_wtf") is None:
        modules |= {"flask_wtf/__init__.py": "", "flask_wtf/csrf.py": CSRF}
    for name, text in modules.items():
        path = folder / "modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    settings = {
        "default_permission": "READ",
        "database_uri": f"sqlite:///{folder}/users.db",
        "admin_username": ADMIN[0],
        "authorization_function": "quench_bearer:authenticate",
        "grant_default_workspace_access": "false",
        "auth_cache_ttl_seconds": "600",  # else each request costs a third of a second for the password's digest
    }
    (folder / "auth.ini").write_text("\n".join(["[mlflow]", *(f"{name} = {text}" for name, text in settings.items())]))
    env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "any",
        "PYTHONPATH": str(folder / "modules"),
    }
    with mlflow_server(folder, "--app-name", "basic-auth", env=env) as url:
        user = {"username": USER[0], "password": USER[1]}
        httpx.post(f"{url}/api/2.0/mlflow/users/create", json=user, auth=ADMIN, timeout=60).raise_for_status()
        yield url


def grant(url: str, kind: str, name: str, permission: str) -> None:
    """Let USER do something with what ADMIN made: an `experiment` by its number, a `registered_model` by its name."""
    asked = {"username": USER[0], "resource_type": kind, "resource_id": name, "permission": permission}
    httpx.post(f"{url}/api/3.0/mlflow/users/permissions/grant", json=asked, auth=ADMIN, timeout=60).raise_for_status()
