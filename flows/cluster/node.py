"""What happens on a node of a Ray cluster: it says what it is, and it makes one step. Ray's worker owns the child."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.run.prefect_pages import PrefectPages
from recipes.problem import Problem, RecipeError
from tasks.runtime.gpus import all_gpus
from tasks.runtime.process.child import verify_checkout
from tasks.runtime.process.environments import environment_problem, installed, locked_versions
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import CHECKOUT, Launcher
from tasks.runtime.process.leases import GrantedLease
from tasks.runtime.process.servers import answers
from tasks.runtime.process.user import settle_user
from tasks.runtime.step import Context, External, Limits, Step, run_step
from tasks.runtime.store.local import MANIFEST, Artifact, Store, StoreTrouble
from tasks.runtime.store.open import open_store
from tasks.runtime.store.s3 import S3Store

TOKENS = "cluster"  # folder of a home, or prefix of a bucket, where preflight leaves a word for the nodes
API_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where artifacts lie: the flow's home, and the bucket behind it, if any."""

    home: Path
    bucket: str | None

    @classmethod
    def of(cls, home: Path) -> Place:
        """Where this process's artifacts lie."""
        return cls(home=home, bucket=os.environ.get("QUENCH_STORE") or None)

    @property
    def here(self) -> Path:
        """The home on this machine. With a bucket each node has its own: QUENCH_HOME of whoever started Ray there."""
        return Path(os.environ.get("QUENCH_HOME", self.home)) if self.bucket else self.home

    def open(self, launcher: Launcher | None = None) -> Store:
        """The store on this machine."""
        os.environ.pop("QUENCH_STORE", None)
        if self.bucket:
            os.environ["QUENCH_STORE"] = self.bucket
        return open_store(self.here, stop=launcher.stop if launcher else None)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster as the report names it."""

    host: str
    address: str
    id: str

    def __str__(self) -> str:
        return f"{self.host} ({self.address}, node {self.id[:8]})"


def this_node() -> Node:
    """The node that this process works on."""
    address = ray.util.get_node_ip_address()
    return Node(host=socket.gethostname(), address=address, id=ray.get_runtime_context().get_node_id())


# ---- what a node says in preflight


@dataclass(frozen=True, kw_only=True)
class NodeQuery:
    """What a node has to answer in preflight.

    Attributes:
        token: Name of a file below TOKENS that the flow has written.
        sizes: Bytes of each file or folder from outside that steps read.
        environments: Python environments that steps start in, besides the main one.
        names: Distributions whose installed version is wanted.
        api: Address of Prefect's API.
    """

    place: Place
    token: str
    sizes: Mapping[str, int]
    environments: Sequence[str]
    names: Sequence[str]
    api: str


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What a node answers.

    Attributes:
        code: Digest of its Quench.
        locked: Versions of its lock.
        installed: Versions of the wanted distributions there.
        sees_token: It reads what the flow wrote.
        other: Paths that are not there, or have other sizes.
        hears_prefect: Prefect's API answers it.
        clock: Its time, Unix seconds.
        gpus: Kinds of its GPUs.
        problems: What is wrong with its environments or its way to the bucket.
    """

    node: Node
    code: str
    locked: Mapping[str, str]
    installed: Mapping[str, str]
    sees_token: bool
    other: Sequence[str]
    hears_prefect: bool
    clock: float
    gpus: Sequence[str] = field(default=())
    problems: Sequence[Problem] = field(default=())


def describe_node(query: NodeQuery) -> NodeReport:
    """Say what this node has."""
    verify_checkout()
    problems = [problem for name in query.environments if (problem := environment_problem(name))]
    sees = False
    try:
        store = query.place.open()
        store.check()
        sees = _sees(store, query.token)
    except RecipeError as error:
        problems += error.problems
    return NodeReport(
        node=this_node(),
        code=code_digest(),
        locked=locked_versions(),
        installed=installed(query.names),
        sees_token=sees,
        other=[path for path, size in query.sizes.items() if size_of(Path(path)) != size],
        hears_prefect=answers(query.api, timeout_s=API_S),
        clock=time.time(),
        gpus=sorted({gpu.kind for gpu in all_gpus()}),  # all: Ray shows a task that wants none none
        problems=problems,
    )


def _sees(store: Store, token: str) -> bool:
    """Read the flow's word and, on a shared path, write an own one beside it."""
    if isinstance(store, S3Store):
        return store.bucket.read(f"{TOKENS}/{token}") is not None
    word = store.home / TOKENS / token
    if not word.is_file():
        return False
    word.with_name(f"{token}-{this_node().id}").touch()
    return True


def code_digest() -> str:
    """sha256 over Quench's own code and what children start by, as it lies in this process's checkout."""
    digest = hashlib.sha256()
    for pattern in ("flows/**/*.py", "tasks/**/*.py", "recipes/**/*.py", "infra/accelerate/*.yaml"):
        for path in sorted(CHECKOUT.glob(pattern)):
            digest.update(f"{path.relative_to(CHECKOUT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; -1 where there is nothing."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else -1


# ---- one step


@dataclass(frozen=True, kw_only=True)
class Handle:
    """An artifact, as one node names it to another.

    Attributes:
        inputs: Digests of its inputs.
        path: Its folder in a home.
    """

    key: str
    stage: str
    fingerprint: str
    inputs: Mapping[str, str]
    path: str

    @classmethod
    def of(cls, step: Step, artifact: Artifact, home: Path) -> Handle:
        """Of a committed artifact of this home."""
        inputs = {name: source["digest"] for name, source in artifact.manifest["inputs"].items()}
        path = str((artifact.folder or artifact.path).relative_to(home))
        return cls(key=step.key, stage=step.stage, fingerprint=step.fingerprint, inputs=inputs, path=path)

    def take(self, store: Store) -> Artifact:
        """The artifact with its files on this machine.

        By its path where it is there, since a shared file system may list a new folder late; else from the bucket.

        Raises:
            StepFailed: It is in neither, or the bucket does not answer.
        """
        folder = store.home / self.path
        if (folder / MANIFEST).is_file():
            return store.fetch(folder)
        try:
            if artifact := store.bring(store.find(self.stage, self.fingerprint, self.inputs)):
                return artifact
            problem = self._absent(folder)
        except StoreTrouble as error:
            problem = error.problems[0]
        raise StepFailed(self.key, problem, log="none: no child was started", returncode=1)

    def _absent(self, folder: Path) -> Problem:
        return Problem(
            what="An artifact that another node made cannot be read here.",
            where=f"{self.key} on {socket.gethostname()}",
            why=f"{folder} is not there, nor in a bucket behind it.",
            next="See that all nodes have the same store; the same command again goes on.",
        )


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a node gets to make a step.

    Attributes:
        known: Inputs that were there before, by key. Those that other nodes make come as results of their tasks.
        cpus: What Ray has leased for it.
    """

    step: Step
    known: Mapping[str, Handle]
    limits: Limits
    place: Place
    cpus: int


@dataclass(frozen=True, kw_only=True)
class Landed:
    """A finished step, where it was made or found, and by which node."""

    handle: Handle
    hit: bool
    node: Node


class FailedOnNode(StepFailed):
    """A step that failed, and where."""

    def __init__(self, error: StepFailed, node: Node) -> None:
        log = error.log if error.log.startswith("none") else f"{node.host}:{error.log}"
        super().__init__(error.step, error.problem, log=log, returncode=error.returncode)
        self.error, self.node = error, node

    def __reduce__(self) -> tuple[object, ...]:
        return (FailedOnNode, (self.error, self.node))


@task(task_run_name="{key}", cache_policy=NO_CACHE, persist_result=False)
def make_on_node(key: str, order: Callable[[], Order], before: Sequence[Landed]) -> Landed:
    """Make one step on the node where Ray placed this.

    Args:
        key: The step's key.
        order: Makes the Order; Prefect would look through the parts of an Order itself for futures.
        before: Steps that had to be made first.
    """
    ordered = order()
    node, step, pages = this_node(), ordered.step, PrefectPages()
    log = get_run_logger()
    log.info("%s on %s", key, node)

    def on_event(_: Step, event: Mapping[str, Any]) -> None:
        if event["kind"] == "progress":
            pages.progress(key, 100.0 * event["done"] / max(event["total"], 1))

    for line in settle_user(ordered.place.here):
        log.warning("%s: %s", node, line)
    with Launcher() as launcher:
        context = Context(
            store=ordered.place.open(launcher),
            launcher=launcher,
            leases=GrantedLease(cpus=ordered.cpus, gpus=ray.get_runtime_context().get_accelerator_ids()["GPU"]),
            limits=ordered.limits,
            on_event=on_event,
            on_line=functools.partial(_say, log),
        )
        known = {**ordered.known, **{landed.handle.key: landed.handle for landed in before}}
        try:
            made = run_step(step, _inputs(step, known, context.store), context)
        except StepFailed as error:
            raise FailedOnNode(error, node) from None
        finally:
            for handler in logging.getLogger("prefect.task_runs").handlers:
                handler.flush()
    return Landed(handle=Handle.of(step, made.artifact, context.store.home), hit=made.hit, node=node)


def _say(log: Any, step: Step, line: str) -> None:
    log.info("%s | %s", step.key, line)


def _inputs(step: Step, known: Mapping[str, Handle], store: Store) -> dict[str, Artifact]:
    """The step's inputs, with their files on this machine; a choice with what it names."""
    inputs: dict[str, Artifact] = {}
    for name, source in step.inputs.items():
        if isinstance(source, External):
            inputs[name] = source.artifact
            continue
        inputs[name] = known[source.key].take(store)
        for other in known.values() if source.stage == "choose" else ():
            if store.home / other.path / "files" == inputs[name].path:
                other.take(store)
    return inputs
