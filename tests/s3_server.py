"""An S3 server on loopback (moto's), a bucket in it, and a wire between that can be cut, bent and counted."""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx

from flows.run.server import wait_for
from tasks.runtime.process.launch import Launcher, child_env
from tasks.runtime.process.ports import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server. users: Environment of each user that a test made."""

    endpoint: str
    users: dict[str, dict[str, str]] = field(default_factory=dict)

    def env(self, url: str, **keys: str) -> dict[str, str]:
        """What a user sets to work with a store there."""
        return {
            **KEYS,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.endpoint,
            **keys,
            "QUENCH_STORE": url,
        }

    def client(self, service: str = "s3") -> Any:
        """boto3's client."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def bucket(self, name: str) -> str:
        """Make a bucket; returns the URL of a store in it."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}/team"

    def keys(self, url: str, prefix: str = "") -> list[str]:
        """Keys of a store, without its prefix."""
        name, _, before = url.removeprefix("s3://").partition("/")
        found = self.client().list_objects_v2(Bucket=name, Prefix=f"{before}/{prefix}").get("Contents", [])
        return [one["Key"].removeprefix(f"{before}/") for one in found]

    def enforce(self) -> None:
        """Ask for valid credentials and rights from now on."""
        httpx.post(f"{self.endpoint}/moto-api/reset-auth", content=b"0").raise_for_status()


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run moto's server while the body runs; it dies with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", folder / "s3.log"
    with Launcher() as launcher:
        child = launcher.start(
            ["exec", "--", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env=child_env(),
            cwd=folder,
            log=log,
        )
        wait_for(lambda: _answers(url), "the S3 server", at=url, child=child, log=log)
        yield S3Server(endpoint=url)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/moto-api/", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass(kw_only=True)
class Wire:
    """Passes requests on to a server.

    Attributes:
        bend: Changes the body of an answer; gets method, path and body.
        hold: Says whether a request is to hang, before it is passed on; gets method and path.
        held: Is set when a request hangs.
        drop: Request headers that do not pass.
        status: Answers with this status instead of passing on; gets method and path.
        error: S3's code in such an answer; without one it has no body.
        ahead_s: Seconds that the server's clock is ahead of ours, as its answers tell.
        sent: Bytes of request bodies.
    """

    endpoint: str
    bend: Callable[[str, str, bytes], bytes] = lambda method, path, body: body
    hold: Callable[[str, str], bool] = lambda method, path: False
    drop: tuple[str, ...] = ()
    status: Callable[[str, str], int | None] = lambda method, path: None
    error: str = ""
    ahead_s: float = 0.0
    held: threading.Event = field(default_factory=threading.Event)
    seen: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0


@contextmanager
def wire(server: str) -> Iterator[Wire]:
    """A proxy on loopback in front of a server."""
    target = server.removeprefix("http://")
    made = Wire(endpoint="")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            made.seen.append((self.command, self.path))
            made.sent += len(body)
            if made.hold(self.command, self.path):
                made.held.set()
                threading.Event().wait(60)
            if (status := made.status(self.command, self.path)) is not None:
                text = f"<Error><Code>{made.error}</Code><Message>Refused.</Message></Error>" if made.error else ""
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())
                return
            far = http.client.HTTPConnection(target, timeout=60)
            far.request(self.command, self.path, body=body, headers=_end_to_end(self.headers, made.drop))
            answer = far.getresponse()
            data = made.bend(self.command, self.path, answer.read())
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() == "date":
                    value = formatdate(time.time() + made.ahead_s, usegmt=True)
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(data)
            far.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass  # noqa: N815 the standard library's names

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed."""

    proxy = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    made.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield made
    finally:
        proxy.shutdown()


def _end_to_end(headers: Mapping[str, str], drop: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in ("connection", "expect", *drop)}
