"""`--runner ray`: the way to a Ray cluster, and all that can be refused before a step is placed on it.

Only this command imports Ray. The flow's process is Ray's driver, on one of the cluster's machines.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flows.cluster.node import TOKENS, Node, NodeQuery, NodeReport, Place, code_digest, describe_node, size_of
from flows.compose import compose, limits
from flows.plan.validate import Validated
from recipes.problem import Problem, RecipeError
from tasks.runtime.process.environments import installed, locked_versions
from tasks.runtime.step import External, Step, resources
from tasks.runtime.store.bucket import CLOCK_S
from tasks.runtime.store.open import open_store
from tasks.runtime.store.s3 import S3Store

ANSWER_S = 3.0  # Ray's own connect goes on for more than a minute where nobody answers
NODE_S = 120.0  # a worker's first start on a busy machine, imports included
MANY = 5
AUTO = "auto"
SCORED = ("reference", "evaluate")  # stages whose identity names the kind of device


@contextlib.contextmanager
def joined(address: str) -> Generator[None]:
    """Be a driver of the cluster while the body runs; leaving it ends every worker that worked for this process.

    Raises:
        RecipeError: No Ray answers there, or not to this machine.
    """
    if address != AUTO:
        _reach(address)
    ours = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address, namespace="quench", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _refused(address, str(error).splitlines()[0]).error() from error
    for number, handler in ours.items():  # Ray puts its own in their place
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise _malformed(address).error()
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            raise _refused(address, f"nothing there speaks gRPC within {ANSWER_S:.0f} s").error() from None


def check_nodes(validated: Validated, *, home: Path, api: str) -> list[NodeReport]:
    """Ask every node whether it has what the steps need.

    Args:
        validated: What is to be made.
        home: QUENCH_HOME of the flow.
        api: Prefect's API as the flow reaches it.

    Raises:
        RecipeError: All that is wrong, node by node, with the remedy.
    """
    make = {line.key for line in validated.plan if not line.hit}
    steps: list[Step] = []
    compose(validated.recipe, validated.pins, steps.append)
    steps = [step for step in steps if step.key in make]
    outside = [source for step in steps for source in step.inputs.values() if isinstance(source, External)]
    mine = installed(list(locked_versions()))
    with _token(home) as token:
        query = NodeQuery(
            place=Place.of(home),
            token=token,
            sizes={str(source.path): size_of(source.path) for source in outside},
            environments=sorted({step.environment for step in steps if step.environment}),
            names=list(mine),
            api=api,
        )
        reports, problems = _ask(query)
        echoes = [path.name for path in (home / TOKENS).glob(f"{token}-*")]
    scored = [step for step in steps if step.stage in SCORED and resources(step, limits(validated.recipe)).gpus]
    kinds = {str(step.params["device"]) for step in scored}
    here = Here(code=code_digest(), locked=locked_versions(), installed=mine, gpus=tuple(kinds))
    problems += [problem for report in reports for problem in differs(report, here, query)]
    if not query.place.bucket:
        unheard = [report for report in reports if not any(report.node.id in name for name in echoes)]
        problems += [_apart(report, home) for report in unheard if report.sees_token]
    problems += _unplaceable(steps, validated)
    if problems:
        raise RecipeError(problems)
    return reports


@contextlib.contextmanager
def _token(home: Path) -> Generator[str]:
    """A file in the store that every node has to see while the body runs."""
    token, store = secrets.token_hex(8), open_store(home)
    if isinstance(store, S3Store):
        store.bucket.create(f"{TOKENS}/{token}", token.encode())
        try:
            yield token
        finally:
            store.bucket.remove(f"{TOKENS}/{token}")
        return
    file = home / TOKENS / token
    file.parent.mkdir(exist_ok=True)
    file.touch()
    try:
        yield token
    finally:
        for path in file.parent.glob(f"{token}*"):
            path.unlink()


class NodeReports(NamedTuple):
    """Each living node's report, and whose clock is wrong."""

    reports: list[NodeReport]
    clocks: list[Problem]


def _ask(query: NodeQuery) -> NodeReports:
    """Ask every living node.

    Raises:
        RecipeError: Nodes that do not answer.
    """
    sent = time.time()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    body = ray.remote(num_cpus=0, max_retries=0)(describe_node)
    calls = {
        node["NodeID"]: body.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        ).remote(query)
        for node in nodes
    }
    answers = NodeReports([], [])
    silent: list[Problem] = []
    for node in nodes:
        try:
            answers.reports.append(report := ray.get(calls[node["NodeID"]], timeout=NODE_S))
            answers.clocks.extend(clocks_apart(report, sent=sent, got=time.time()))
        except GetTimeoutError:
            silent.append(_silent(node, f"It did not answer within {NODE_S:.0f} s."))
        except RayError as error:
            silent.append(_silent(node, str(error).strip().splitlines()[-1]))
    if silent:
        raise RecipeError(silent)
    return answers


# ---- what is wrong


class Here(NamedTuple):
    """What this machine has and every node has to have; see NodeReport.

    Attributes:
        gpus: Kinds of GPUs that arms are to be scored on; empty where none is scored, or on CPUs.
    """

    code: str
    locked: Mapping[str, str]
    installed: Mapping[str, str]
    gpus: Sequence[str] = ()


def differs(report: NodeReport, here: Here, query: NodeQuery) -> Iterator[Problem]:
    """How one node differs from this machine."""
    where = str(report.node)
    if names := _changed(here.locked, report.locked):
        yield _versions(where, "lock", names)
    if names := _changed(here.installed, report.installed):
        yield _versions(where, "environment", names)
    if report.code != here.code:
        yield Problem(
            what="A node has another Quench.",
            where=where,
            why=f"The digest of its code is {report.code[:12]}, here it is {here.code[:12]}.",
            next="Check the same commit out there, without changes, and start Ray from it.",
        )
    if here.gpus and (other := set(report.gpus) - set(" or ".join(here.gpus).split(" or "))):
        yield Problem(
            what="A node has another kind of GPU than this machine.",
            where=where,
            why=f"{', '.join(sorted(other))} there, {' or '.join(here.gpus)} here. Sums in bf16 differ between them: "
            "arms that were scored on both could not be compared, and such a step would refuse to run.",
            next="Start the run from a machine with that kind of GPU, and Ray on machines of one kind alone.",
        )
    yield from _cut_off(report, where, query)


def _cut_off(report: NodeReport, where: str, query: NodeQuery) -> Iterator[Problem]:
    """What one node does not see or reach."""
    yield from (replace(problem, where=f"{where}: {problem.where}") for problem in report.problems)
    if not report.sees_token and not report.problems:
        yield _apart(report, query.place.home)
    if report.other:
        yield Problem(
            what="A node does not have what the recipe reads.",
            where=where,
            why=f"Missing there or of another size: {_few(report.other)}.",
            next="Put it below a path that all nodes see, and name it by that path in the recipe.",
        )
    if not report.hears_prefect:
        yield Problem(
            what="A node does not reach Prefect.",
            where=where,
            why=f"{query.api} does not answer it; `quench run` starts its own server on loopback.",
            next="Start a server that all nodes reach (`quench up --host ADDRESS` here, or your own) and set "
            "PREFECT_API_URL to its address.",
        )


def _changed(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return [f"{name} {here.get(name, 'absent')} here, {there.get(name, 'absent')} there" for name in names]


def _versions(where: str, what: str, names: Sequence[str]) -> Problem:
    return Problem(
        what=f"A node has another {what}.",
        where=where,
        why=f"{_few(names)}. Artifacts of one run are made by one set of versions.",
        next="Check the same commit out there, run `make install`, and start Ray again from that .venv.",
    )


def _apart(report: NodeReport, home: Path) -> Problem:
    return Problem(
        what="A node does not have the same store.",
        where=str(report.node),
        why=f"What is written below {home} here is not seen there, or the other way round.",
        next="Let QUENCH_HOME name a folder on a file system that all nodes mount at the same path, or set "
        "QUENCH_STORE=s3://BUCKET/PREFIX.",
    )


def _unplaceable(steps: Sequence[Step], validated: Validated) -> Iterator[Problem]:
    """Steps that no living node could ever take: Ray would wait for one for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    own = ray.get_runtime_context().get_node_id()
    here = [node["Resources"] for node in ray.nodes() if node["NodeID"] == own]
    for step in steps:
        need = resources(step, limits(validated.recipe))
        able = here if step.whole_machine else nodes
        if any(node.get("CPU", 0) >= max(1, need.cpus) and node.get("GPU", 0) >= need.gpus for node in able):
            continue
        whole = "the flow's own node, where speed is measured," if step.whole_machine else "any node"
        yield Problem(
            what=f"No node can take {step.key}.",
            where="run",
            why=f"It needs {max(1, need.cpus)} CPU and {need.gpus} GPU; {whole} has "
            + " or ".join(sorted({f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in able}))
            + ", as Ray was told.",
            next="Set measure.enabled: false, or start Ray here with --num-cpus."
            if step.whole_machine
            else "Start a node that has them, or lower run.threads or run.processes.",
        )


def clocks_apart(report: NodeReport, *, sent: float, got: float) -> Iterator[Problem]:
    """Whether a node's clock, read between these two moments of ours, cannot be within CLOCK_S of ours."""
    off = min(report.clock - sent, 0.0) + max(report.clock - got, 0.0)
    if abs(off) > CLOCK_S:
        yield Problem(
            what="A node has another time.",
            where=str(report.node),
            why=f"Its clock is {abs(off) / 60:.0f} minutes {'ahead of' if off > 0 else 'behind'} this machine's: the "
            "times in logs, in the report and in MLflow would contradict each other.",
            next="Set both clocks: timedatectl set-ntp true.",
        )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more


def _silent(node: Mapping[str, Any], why: str) -> Problem:
    return Problem(
        what="A node cannot run Quench.",
        where=str(Node(host=node["NodeManagerHostname"], address=node["NodeManagerAddress"], id=node["NodeID"])),
        why=why,
        next="Check the same commit out there, run `make install`, and start Ray from that .venv.",
    )


def _malformed(address: str) -> Problem:
    return Problem(
        what="This is no address of a Ray cluster.",
        where=f"--address {address}",
        why="It has to be HOST:PORT of the head node, or auto; Ray's client (ray://) does not tell where steps run.",
        next="Log in to a machine of the cluster, and there: --address auto",
    )


def _refused(address: str, why: str) -> Problem:
    return Problem(
        what="No Ray answers.",
        where=f"--address {address}",
        why=why,
        next="On the head: .venv/bin/ray start --head --port=6379. On every other machine, and on this one if it is "
        "none of them yet: .venv/bin/ray start --address=HEAD:6379. Or leave --runner ray out.",
    )
