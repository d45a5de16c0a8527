"""`make audit` against a database on loopback with OSV's interface: found, accepted, and not reached."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.process.ports import free_port

pytestmark = pytest.mark.slow  # pip-audit comes from the package index, as all that is installed
LOCK = "attrs==26.1.0\npackaging==25.0\n"
BAD = {
    "id": "GHSA-planted",
    "aliases": ["CVE-2026-0001"],
    "summary": "planted",
    "affected": [
        {
            "package": {"name": "attrs", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        name = json.loads(self.rfile.read(int(self.headers["content-length"])))["package"]["name"]
        self.asked.append(name)
        data = json.dumps({"vulns": [BAD]} if name == "attrs" else {}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def database() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()


def audit(folder: Path, url: str, *, accepted: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "main.txt").write_text(LOCK)
    (folder / "known.txt").write_text(accepted)
    words = ["--osv-url", url, "--known", str(folder / "known.txt"), str(folder / "main.txt")]
    return subprocess.run([sys.executable, "infra/audit.py", *words], cwd=CHECKOUT, capture_output=True, text=True)


def test_a_known_vulnerability_fails_until_it_is_accepted_with_reason_and_date(database: str, tmp_path: Path) -> None:
    found = audit(tmp_path, database)
    assert found.returncode == 1 and "2 packages, 1 known" in found.stdout, found.stdout + found.stderr
    assert "attrs 26.1.0: CVE-2026-0001, GHSA-planted; fixed in 99.0" in found.stdout
    assert set(Handler.asked) == {"attrs", "packaging"}
    for name in ("GHSA-planted", "CVE-2026-0001"):
        passed = audit(tmp_path, database, accepted=f"# ours\n{name} 2026-11-25 we never call it\n")
        assert passed.returncode == 0 and "accepted since 2026-11-25: we never call it" in passed.stdout
    undated = audit(tmp_path, database, accepted="GHSA-planted we never call it\n")
    assert undated.returncode == 1 and "ID YYYY-MM-DD REASON" in undated.stderr


def test_no_database_is_no_verdict_and_says_so(tmp_path: Path) -> None:
    done = audit(tmp_path, f"http://127.0.0.1:{free_port()}/v1/query")
    assert done.returncode == 0 and done.stdout.startswith("not audited: main.txt: "), done.stdout
    assert len(done.stdout.splitlines()) == 1
