"""`quench up`: Prefect's server, MLflow's server, the worker that executes deployments, and the deployments.

One foreground process owns all of it. A part that ends is started again; Ctrl-C and SIGTERM end everything within ten
seconds, and a SIGKILL does through the kernel (tasks/runtime/process/child.py). Runs that nobody executes any more are
marked Crashed: at the end, and at the next start where there was no end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NoReturn

import psutil

from flows.mlflow_uri import own_database
from flows.run.server import links, prefect_settings, start_prefect, wait_for
from flows.service.postgres import Stores, stores
from flows.tracking.moved import ARTIFACTS, follow
from recipes.problem import Problem
from tasks.runtime.process.launch import CHECKOUT, Child, Launcher, child_env
from tasks.runtime.process.servers import answers
from tasks.runtime.store.home import open_home
from tasks.runtime.store.local import find_home, locked_now, read_json, write_json

LOOPBACK = ("127.0.0.1", "localhost")
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
PORTS_TRIED = 100
POLL_S = 0.5
STOP_S = 5.0  # for the flows under way; then, together with the servers' 3 s, less than the 10 that a stop may take
STREAM = {  # without both, `prefect deployment run --watch` shows states, but no line of the log
    "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
    "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
}
WORKER_QUERY_S = 2  # Prefect's own default lets a new run wait for up to 10 s
OFTEN = 3  # times within
SHORT_S = 120.0  # that a part may end before all is given up


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """Options of `quench up`; a port of None is the usual one, or the next free one."""

    host: str = "127.0.0.1"
    prefect_port: int | None = None
    mlflow_port: int | None = None
    postgres: str | None = None


@dataclass(kw_only=True)
class Service:
    """One of the three children."""

    name: str
    start: Callable[[], Child]
    log: Path
    child: Child | None = None
    ends: list[float] = field(default_factory=list)

    def ended(self) -> bool:
        """True once after each end."""
        return self.child is not None and self.child.ended.done()

    def too_often(self) -> bool:
        """Note an end; True where there were too many in a short time."""
        now = time.monotonic()
        self.ends = [*(end for end in self.ends if now - end < SHORT_S), now]
        return len(self.ends) >= OFTEN


def command(args: argparse.Namespace) -> NoReturn:
    """Keep everything running until SIGINT or SIGTERM, then leave.

    Raises:
        RecipeError: As of `up`.
    """
    signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))  # a shell's background job starts with it ignored
    options = UpOptions(**{option.name: getattr(args, option.name) for option in fields(UpOptions)})
    up(find_home(), options, lambda text: print(text, flush=True))
    os._exit(0)  # everything has ended; tearing down the modules would take 2 of the 10 s that a stop may


def up(home: Path, options: UpOptions, say: Callable[[str], None]) -> None:
    """Start everything, say when it is ready, keep it running until interrupted.

    Args:
        home: QUENCH_HOME.
        options: Host, ports, and the URL of a PostgreSQL database that takes the place of SQLite.
        say: Prints a line.

    Raises:
        RecipeError: Another `quench up` has this home, a port is taken, a part does not start or keeps ending.
        KeyboardInterrupt: Never: an interrupt is the way to end it.
    """
    open_home(home)
    with (
        only_one(home),
        contextlib.suppress(KeyboardInterrupt),
        taken_port(options.host, options.prefect_port, PREFECT_PORT, option="--prefect-port") as prefect,
        taken_port(options.host, options.mlflow_port, MLFLOW_PORT, option="--mlflow-port") as mlflow,
    ):
        if options.host not in LOOPBACK:
            say(exposed(options.host, prefect, mlflow))
        options = replace(options, prefect_port=prefect, mlflow_port=mlflow)
        with Launcher() as launcher:
            Services(home, launcher, options, say=say).run()


class Services:
    """The three parts: they start in this order, and end in the reverse."""

    def __init__(self, home: Path, launcher: Launcher, options: UpOptions, *, say: Callable[[str], None]) -> None:
        self.home, self.launcher, self.options, self.say = home, launcher, options, say
        near = "127.0.0.1" if options.host in (*LOOPBACK, "0.0.0.0") else options.host
        self.prefect_url = f"http://{near}:{options.prefect_port}"
        self.mlflow_url = f"http://{near}:{options.mlflow_port}"
        self.api = f"{self.prefect_url}/api"
        self.stores: Stores | None = stores(options.postgres) if options.postgres else None
        self.database = self.stores.mlflow if self.stores else own_database(home)
        self.link = links() / f"up-{os.getpid()}.json"
        self.folder = home / "up"
        self.folder.mkdir(exist_ok=True)
        self.prefect = self._part("prefect", self._start_prefect)
        self.mlflow = self._part("mlflow", self._start_mlflow)
        self.worker = self._part("worker", self._start_worker)
        self.parts = (self.prefect, self.mlflow, self.worker)

    def _part(self, name: str, start: Callable[[Path], Child]) -> Service:
        log = self.folder / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.before"))
        return Service(name=name, start=lambda: start(log), log=log)

    def run(self) -> None:
        """Start, keep, and end it all."""
        os.environ.update({**prefect_settings(self.home), "PREFECT_API_URL": self.api, "QUENCH_HOME": str(self.home)})
        try:
            self._start()
            while True:
                for part in self.parts:
                    if part.ended():
                        self._again(part)
                time.sleep(POLL_S)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # it is ending already
            self._stop()

    def _start(self) -> None:
        (self.home / "up.json").unlink(missing_ok=True)  # of one that was killed
        for note in follow(self.home, self.database):
            self.say(note)
        self.prefect.child = self.prefect.start()
        self.mlflow.child = self.mlflow.start()
        from flows.run.folder import ended, stop_dead
        from flows.service.deployments import (  # 8 s of imports while the servers start
            heartbeat,
            held,
            mark_crashed,
            register,
        )
        from flows.tracking.sync import sync_run

        self._wait(self.prefect, lambda: answers(self.api), "the Prefect server", at=self.api)
        stopped = stop_dead(self.home)
        for name in mark_crashed("nobody executes it any more; running it again resumes", dead=ended(self.home)):
            self.say(f"marked as crashed: {name}, which nobody executes any more")
        names = register(Path.cwd())
        for line in held():
            self.say(line)
        before = heartbeat()
        self.worker.child = self.worker.start()
        self._wait(self.mlflow, lambda: answers(self.mlflow_url), "the MLflow server", at=self.mlflow_url)
        self._wait(self.worker, lambda: heartbeat() != before, "the worker", at=self.api)
        record = {"pid": os.getpid(), "home": str(self.home), "folder": str(Path.cwd())}
        record |= {"prefect": self.api, "mlflow": self.mlflow_url, "deployments": names}
        record |= {"tracking": self.mlflow_url} if self.stores else {}
        write_json(self.home / "up.json", record)
        self._link()
        for folder in stopped:
            sync_run(self.home, folder, say=self.say)
        self.say(f"ready  prefect {self.prefect_url}  mlflow {self.mlflow_url}")

    def _wait(self, part: Service, ready: Callable[[], bool], what: str, *, at: str) -> None:
        wait_for(ready, what, at=at, child=part.child, log=part.log)

    def _link(self) -> None:
        """Let folders with a home of their own find this one; forget those that were killed."""
        try:
            self.link.parent.mkdir(parents=True, exist_ok=True)
            for link in self.link.parent.glob("up-*.json"):
                if not psutil.pid_exists(int(link.stem.removeprefix("up-"))):
                    link.unlink(missing_ok=True)
            self.link.unlink(missing_ok=True)
            self.link.symlink_to(self.home / "up.json")
        except OSError as error:
            self.say(f"other folders need QUENCH_HOME={self.home} to find this: {error}")

    def _again(self, part: Service) -> None:
        """Start a part that ended; runs that a worker took along are marked.

        Raises:
            RecipeError: It keeps ending.
        """
        if part.child is not None:
            self.launcher.end(part.child)  # what it left in its group
        if part.too_often():
            raise Problem(
                what=f"{part.name} ended {OFTEN} times within {SHORT_S:.0f} s",
                where=str(part.log),
                why=" | ".join(part.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]),
                next="fix what the log says and run `quench up` again",
            ).error()
        self.say(f"{part.name} ended and is started again; its log: {part.log}")
        if part is self.worker:
            self._mark("its worker ended; running it again resumes")
        part.child = part.start()

    def _stop(self) -> None:
        """End the flows under way, the worker, mark what did not say its end, end the servers."""
        if self.worker.child is not None:
            self.say("stopping")
            self._end_flows(self.worker.child)
            self.worker.child.signal(signal.SIGKILL)
            self._mark("`quench up` was stopped; running it again resumes")
        (self.home / "up.json").unlink(missing_ok=True)
        self.link.unlink(missing_ok=True)
        self.launcher.end_all()

    def _end_flows(self, worker: Child) -> None:
        """SIGTERM to the flows, not to the worker: it waits for them and tells Prefect what became of each."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(worker.pid).children(recursive=True)
            flows = [child for child in children if "prefect.engine" in child.cmdline()]
            for process in flows:
                process.terminate()
            psutil.wait_procs(flows, timeout=STOP_S)

    def _mark(self, why: str) -> None:
        """Mark what nobody executes any more; where Prefect is gone, the next start does."""
        import httpx

        from flows.service.deployments import mark_crashed

        with contextlib.suppress(httpx.HTTPError):
            for name in mark_crashed(why):
                self.say(f"marked as crashed: {name}")

    def _start_prefect(self, log: Path) -> Child:
        more = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.stores.prefect} if self.stores else {}
        port = int(self.prefect_url.rsplit(":", 1)[1])
        settings = {**STREAM, **more, "PREFECT_SERVER_UI_API_URL": self.api}  # browsers ask there
        return start_prefect(self.home, self.launcher, port=port, host=self.options.host, log=log, settings=settings)

    def _start_mlflow(self, log: Path) -> Child:
        """MLflow on the SQLite file that runs write to; artifacts are local files, so weights pass no server."""
        port = self.mlflow_url.rsplit(":", 1)[1]
        files = ["--no-serve-artifacts", "--default-artifact-root", (self.home / ARTIFACTS).as_uri()]
        words = ["server", "--host", self.options.host, "--port", port, "--workers", "1", *files]
        own = {"MLFLOW_BACKEND_STORE_URI": self.database, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        env = {**child_env(keep=("MLFLOW_", "PG")), **own, **self._modules()}
        return self._guarded("mlflow", words, env=env, log=log)

    def _start_worker(self, log: Path) -> Child:
        from flows.service.deployments import POOL, WORKER

        words = ["worker", "start", "--pool", POOL, "--name", WORKER, "--type", "process", "--install-policy", "never"]
        env = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": str(WORKER_QUERY_S), **self._modules()}
        if self.stores:
            env.setdefault("MLFLOW_TRACKING_URI", self.mlflow_url)
        return self._guarded("prefect", words, env=env, log=log)

    def _guarded(self, program: str, words: list[str], *, env: Mapping[str, str], log: Path) -> Child:
        path = Path(sys.executable).with_name(program)
        return self.launcher.start(["guard", "--", str(path), *words], env=env, cwd=self.home, log=log)

    def _modules(self) -> dict[str, str]:
        """Flows import this checkout, not a tasks.py that lies where somebody typed a command."""
        return {"PYTHONPATH": str(CHECKOUT), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def only_one(home: Path) -> Generator[None]:
    """Hold the home's lock while the body runs; a dead owner's lock is free.

    Raises:
        RecipeError: Another `quench up` holds it.
    """
    with locked_now(home / "up.lock") as ours:
        if not ours:
            record = read_json(home / "up.json") if (home / "up.json").exists() else {}
            at = f"process {record['pid']}, Prefect at {record['prefect']}" if record else "still starting"
            raise Problem(
                what="`quench up` is running on this home already",
                where=str(home),
                why=f"{at}; two workers on one database would execute each other's runs",
                next="use that one, or end it by Ctrl-C or SIGTERM; or set another QUENCH_HOME",
            ).error()
        yield


@contextlib.contextmanager
def taken_port(host: str, wanted: int | None, usual: int, *, option: str) -> Generator[int]:
    """The wanted port, or the usual one or the next that nobody listens at; no other `quench up` gets it meanwhile.

    A server listens only seconds after its port was chosen: of two that start at once, the second would take the
    first one's server for its own. So the port is claimed by a name that the kernel frees with its process
    (unix(7), abstract sockets).

    Raises:
        RecipeError: The wanted port is taken, or none is free.
    """
    tried = [wanted] if wanted is not None else range(usual, usual + PORTS_TRIED)
    for port in tried:
        with socket.socket(socket.AF_UNIX) as claim:
            if _binds(claim, f"\0quench-port-{port}") and _free(host, port):
                yield port
                return
    raise Problem(
        what=f"port {tried[0]} is taken" if wanted is not None else f"no port from {usual} on is free",
        where=f"{option}, {host}",
        why="a server has to listen there",
        next=f"leave {option} out, or name another",
    ).error()


def _free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _binds(probe, (host, port))


def _binds(probe: socket.socket, address: str | tuple[str, int]) -> bool:
    try:
        probe.bind(address)
    except OSError:
        return False
    return True


def exposed(host: str, prefect: int, mlflow: int) -> str:
    """What listening anywhere but on loopback means."""
    return (
        f"--host {host}: whoever reaches this machine at ports {prefect} and {mlflow} can, without a password, start "
        "and cancel runs with any recipe that this user can read, in any folder and with any command of Prefect's job "
        "variables, and read and change every run, report and model in MLflow"
    )
