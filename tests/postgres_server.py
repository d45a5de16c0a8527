"""A PostgreSQL server on loopback, of Debian's package (`apt-get install postgresql`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2

from tasks.runtime.process.ports import free_port

START_S = 60


@contextlib.contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """Run one while the body runs, not as root; gives the URL of an empty database. `folder` is made for its files."""
    elsewhere = Path(shutil.which("postgres") or "postgres").parent
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=elsewhere)
    folder.mkdir()
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(0o755)
    as_user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "nobody")
    data, port = str(folder / "data"), free_port()
    made = [*as_user, str(programs / "initdb"), "-D", data, "-U", "quench", "-A", "trust"]
    subprocess.run(made, check=True, capture_output=True)
    words = [str(programs / "postgres"), "-D", data, "-p", str(port), "-c", f"unix_socket_directories={folder}"]
    with subprocess.Popen([*as_user, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        url = f"postgresql://quench@127.0.0.1:{port}/postgres"
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(psycopg2.OperationalError):
                psycopg2.connect(url).close()
                break
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield url
        server.terminate()
