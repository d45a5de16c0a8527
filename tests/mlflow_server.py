"""MLflow's own server, which takes artifacts through itself (its default)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.run.server import wait_for
from tasks.runtime.process.launch import Launcher, child_env
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import answers


@contextmanager
def mlflow_server(folder: Path, *more: str, database: str = "", port: int = 0) -> Iterator[str]:
    """Run it on loopback while the body runs; gives its address. SQLite below `folder`, any port, if none is named."""
    url, log = f"http://127.0.0.1:{(port := port or free_port())}", folder / "log.txt"
    database = database or f"sqlite:///{folder}/other.db"
    words = ["server", "--workers", "1", "--port", str(port), "--backend-store-uri", database, *more]
    with Launcher() as launcher:
        child = launcher.start(
            ["exec", "--", str(Path(sys.executable).with_name("mlflow")), *words],
            env=child_env() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=folder,
            log=log,
        )
        wait_for(lambda: answers(url), "MLflow", at=url, child=child, log=log)
        yield url
