"""The Prefect server of a run: the one that QUENCH_HOME/up.json names if it answers, else an own child on SQLite.

Never Prefect's ephemeral mode: such a server can outlive a flow that is ended by a signal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipes.problem import Problem
from tasks.runtime.process.launch import Child, Launcher, child_env
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import answers
from tasks.runtime.store.local import read_json

SERVER_SECRETS = ("PREFECT_", "PG")  # its own settings, and PostgreSQL's PGPASSWORD
START_S = 120  # 10 to 15 s on a new database on two cores; much more only when something is wrong


def prefect_settings(home: Path) -> dict[str, str]:
    """Environment that keeps Prefect below QUENCH_HOME and quiet on the network."""
    return {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "true",  # the word that MLflow takes too
    }


def links() -> Path:
    """Folder of links to the up.json of each `quench up` of this user, by process id."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "quench"


def serving(home: Path) -> list[dict[str, Any]]:
    """The up.json of this home's `quench up`; without one, of all that this user runs. Only those that answer."""
    own = home / "up.json"
    for paths in ([own], sorted(links().glob("up-*.json"))):
        records = [read_json(path) for path in paths if path.exists()]
        if alive := [record for record in records if answers(record["prefect"], timeout_s=10)]:
            return alive
    return []


def start_prefect(
    home: Path,
    launcher: Launcher,
    *,
    port: int,
    log: Path,
    host: str = "127.0.0.1",
    settings: Mapping[str, str] | None = None,
) -> Child:
    """Start a Prefect server with its database below QUENCH_HOME, or as `settings` say. Does not wait.

    Args:
        home: QUENCH_HOME.
        launcher: Owns the child.
        port: TCP port.
        log: Is appended to.
        host: Address to listen at.
        settings: More of Prefect's environment variables.
    """
    (home / "prefect").mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).with_name("prefect")
    own = {"PREFECT_SERVER_LOGGING_LEVEL": "WARNING", "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api"}
    env = child_env(keep=SERVER_SECRETS) | prefect_settings(home) | own | dict(settings or {})
    words = [str(program), "server", "start", "--host", host, "--port", str(port)]
    return launcher.start(["exec", "--", *words], env=env, cwd=home, log=log)


def wait_for(ready: Callable[[], bool], what: str, *, at: str, child: Child | None, log: Path) -> None:
    """Return when a server answers.

    Raises:
        RecipeError: It ended or did not answer in time; with the end of its log.
    """
    deadline = time.monotonic() + START_S
    while not ready():
        ended = child is not None and child.ended.done()
        if ended or time.monotonic() > deadline:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            raise Problem(
                what=f"{what} {'ended' if ended else f'did not answer within {START_S} s'}",
                where=at,
                why=" | ".join(lines[-5:]) or "its log is empty",
                next=f"read {log}; running the same command again starts it anew",
            ).error()
        time.sleep(0.1)


def there_is(home: Path) -> str | None:
    """Address of the server of PREFECT_API_URL or up.json, where one answers."""
    up = home / "up.json"
    known = [os.environ.get("PREFECT_API_URL", ""), read_json(up).get("prefect", "") if up.exists() else ""]
    # A refused connection answers at once, a busy server does not.
    return next((api for api in filter(None, known) if answers(api, timeout_s=10)), None)


class OwnServer:
    """A Prefect server that lives as long as the launcher that started it."""

    def __init__(self, home: Path, launcher: Launcher) -> None:
        self._home = home
        self._launcher = launcher
        self._child: Child | None = None
        self.api = ""

    def start(self) -> None:
        """Use the server that there is, else start one. Does not wait."""
        if api := there_is(self._home):
            self.api = api
            return
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        self._child = start_prefect(self._home, self._launcher, port=port, log=self._log)

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            RecipeError: It ended or did not answer in time; with the end of its log.
        """
        wait_for(lambda: answers(self.api), "the Prefect server", at=self.api, child=self._child, log=self._log)

    @property
    def ui(self) -> str:
        """Address of its pages."""
        return self.api.removesuffix("/api")

    @property
    def _log(self) -> Path:
        return self._home / "prefect" / "server.log"
