"""One run over a Ray cluster of two nodes: a node killed, a run cancelled, and what is refused beforehand."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.problem import RecipeError
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import answers
from tests.conftest import QUICKSTART, World
from tests.flows.test_resume import processes_of
from tests.flows.test_run import fingerprints
from tests.ray_cluster import NICE, RayCluster, ray_cluster
from tests.s3_server import KEYS

# From the signal to no child on either node: the issue allows 10 s.
GONE_S = 10.0
START_S = 240.0  # two Ray workers and two children on two busy cores
TWO = ("base-nf4", "nf4-adapter")  # neither waits for the other, and nothing waits for them


UNMEASURED = ("--set", "measure.enabled=false")
BUCKET = "s3://nodes/team"
MAKE_BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='nodes')"


@pytest.fixture(scope="module")
def bucket() -> dict[str, str]:
    """Environment of whoever works with the bucket, in the cluster's network; its server is `started`."""
    return {**KEYS, "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}


@pytest.fixture(scope="module")
def node_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the nodes keep what they fetch from the bucket; without one, the flow's home is theirs."""
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def cluster(bucket: dict[str, str], node_home: Path) -> Iterator[RayCluster]:
    with ray_cluster(QUENCH_CPU_SLOTS="1", QUENCH_HOME=str(node_home), **bucket) as made:
        yield made


def start(world: World, cluster: RayCluster, *more: str, **env: str) -> subprocess.Popen[str]:
    words = ["run", str(world.recipe), "--runner", "ray", "--address", cluster.address, *(more or UNMEASURED)]
    return subprocess.Popen(
        cluster.inside(world.argv(*words)),
        env={**world.env, "PREFECT_API_URL": cluster.api, **env},
        cwd=world.home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


def children(world: World) -> list[int]:
    return [pid for pid, line in processes_of(world.home).items() if "tasks.runtime.process.child run" in line]


def wait_for_two(world: World, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_S
    while len(children(world)) < 2:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, "no two children were seen"
        time.sleep(0.05)


def two_nodes(cluster: RayCluster) -> list[str]:
    if len(cluster.nodes) < 2:
        cluster.add()
    return cluster.nodes


@pytest.mark.slow
@pytest.mark.system
def test_two_nodes_share_the_steps_and_make_the_same_bytes(world: World, cluster: RayCluster) -> None:
    nodes = two_nodes(cluster)
    digests = {key: one["digest"] for key, one in by_key(world).items()}
    world.drop("quantize", "rtn-w4-g128")
    world.drop("evaluate", "base-nf4")
    run = start(world, cluster)
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    steps = world.steps()
    made = {key: one["node"]["id"] for key, one in steps.items() if one["status"] == "made"}
    assert set(made) == {"quantize/rtn-w4-g128", "evaluate/base-nf4"}
    assert set(made.values()) == set(nodes)
    # RTN's bytes do not depend on where it runs; scores neither, on one kind of machine.
    assert {key: by_key(world)[key]["digest"] for key in made} == {key: digests[key] for key in made}
    shown = world.quench("report").stdout
    assert all(f"node {node[:8]}" in shown for node in nodes)
    assert steps["train/small"]["status"] == "hit" and "node" not in steps["train/small"]


@pytest.mark.slow
@pytest.mark.system
def test_nodes_that_share_no_folder_work_through_a_bucket(
    world: World, cluster: RayCluster, bucket: dict[str, str], node_home: Path
) -> None:
    two_nodes(cluster)
    digests = {key: one["digest"] for key, one in by_key(world).items()}
    dropped = ("quantize/rtn-w4-g128", "evaluate/rtn-w4-g128", "evaluate/base-nf4")
    for key in dropped:
        world.drop(*key.split("/"))
    port = bucket["AWS_ENDPOINT_URL"].rpartition(":")[2]
    serve = cluster.inside([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port])
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        make = cluster.inside([sys.executable, "-c", MAKE_BUCKET])
        wait_for(lambda: not subprocess.run(make, env={**os.environ, **bucket}, capture_output=True).returncode, server)
        run = start(world, cluster, QUENCH_STORE=BUCKET, **bucket)
        out, _ = run.communicate(timeout=600)
    finally:
        server.kill()
        server.wait()
    assert run.returncode == 0, out
    made = {key for key, one in world.steps().items() if one["status"] == "made"}
    assert made == set(dropped)
    # Made below the nodes' own folder, of inputs that came through the bucket, and back by the bucket.
    theirs = [path.parent.relative_to(node_home / "store").as_posix() for path in node_home.rglob("manifest.json")]
    assert all(any(one.startswith(f"{key}-") for one in theirs) for key in made), theirs
    assert {key: by_key(world)[key]["digest"] for key in made} == {key: digests[key] for key in made}


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.system
def test_speed_is_measured_on_the_flows_own_node(world: World, cluster: RayCluster) -> None:
    two_nodes(cluster)
    world.drop("measure")
    run = start(world, cluster, "--set", "measure.enabled=true")
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    nodes = {one["node"]["id"] for key, one in world.steps().items() if key.startswith("measure/")}
    assert len(nodes) == 1 and nodes == {cluster.nodes[0]}  # the flow joined Ray by the head's address


def by_key(world: World) -> dict[str, dict[str, str]]:
    return {one["key"]: one for one in world.report()["steps"]}


@pytest.mark.slow
@pytest.mark.system
def test_a_node_killed_in_the_middle_costs_nothing_that_had_finished(world: World, cluster: RayCluster) -> None:
    head, other = two_nodes(cluster)
    for slug in TWO:
        world.drop("evaluate", slug)
    before = fingerprints(world.home)
    run = start(world, cluster)
    wait_for_two(world, run)
    cluster.kill(other)
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    steps = world.steps()
    assert {steps[f"evaluate/{slug}"]["status"] for slug in TWO} == {"made"}
    assert {steps[f"evaluate/{slug}"]["node"]["id"] for slug in TWO} == {head}
    after = fingerprints(world.home)
    assert {name: after.get(name) for name in before} == before
    assert not list((world.home / "partial").glob("evaluate/*"))


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_ends_leaves_no_child_on_either_node(
    world: World, cluster: RayCluster, number: signal.Signals
) -> None:
    two_nodes(cluster)
    for slug in TWO:
        world.drop("evaluate", slug)
    run = start(world, cluster)
    wait_for_two(world, run)
    run.send_signal(number)
    clock = time.monotonic()
    while left := children(world):
        assert time.monotonic() - clock < GONE_S, left
        time.sleep(0.1)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == (-number if number == signal.SIGKILL else 130), out
    assert not any("flows.cli" in line for line in processes_of(world.home).values())


@pytest.mark.slow
@pytest.mark.system
def test_a_step_that_fails_by_itself_is_tried_once(world: World, cluster: RayCluster) -> None:
    two_nodes(cluster)
    for slug in TWO:
        world.drop("evaluate", slug)
    run = start(world, cluster)
    wait_for_two(world, run)
    victim = next(pid for pid in children(world) if "nf4-adapter" in processes_of(world.home)[pid])
    os.kill(victim, signal.SIGKILL)
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 1 and "SIGKILL" in out, out
    failed = world.steps()["evaluate/nf4-adapter"]
    assert failed["status"] == "failed" and failed["node"] and world.steps()["evaluate/base-nf4"]["status"] == "made"
    (partial,) = (world.home / "partial" / "evaluate").glob("nf4-adapter-*")
    assert [path.name for path in partial.glob("attempt-*")] == ["attempt-1"]


@pytest.mark.slow
@pytest.mark.system
def test_a_node_of_another_lock_and_code_is_named_with_both_versions(
    world: World, cluster: RayCluster, tmp_path: Path
) -> None:
    world.drop("evaluate", TWO[0])
    other = tmp_path / "checkout"
    for name in ("flows", "tasks", "recipes", "infra/locks", "infra/accelerate"):
        shutil.copytree(CHECKOUT / name, other / name, ignore=shutil.ignore_patterns("__pycache__", "quickstart"))
    lock = other / "infra" / "locks" / "main.txt"
    lock.write_text(lock.read_text().replace("peft==0.21.2", "peft==0.20.0"))
    with (other / "tasks" / "jobs" / "evaluate.py").open("a") as code:
        code.write("# one more line\n")
    runs = sorted((world.home / "runs").iterdir())
    node = cluster.add(PYTHONPATH=str(other))
    try:
        said = refused(world, cluster)
    finally:
        cluster.kill(node)
        wait_for(lambda: node not in cluster.alive(), cluster.process)
    assert "A node has another lock." in said and "peft 0.21.2 here, 0.20.0 there" in said
    assert "A node has another Quench." in said and "The digest of its code is" in said
    assert f"node {node[:8]}" in said and said.count("error:") == 2
    assert sorted((world.home / "runs").iterdir()) == runs and not children(world)


def refused(world: World, cluster: RayCluster, *more: str, **env: str) -> str:
    run = start(world, cluster, *more, **env)
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 2, out
    return out


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("what", ["store", "base"])
def test_a_node_that_does_not_see_what_the_flow_sees_is_refused(world: World, cluster: RayCluster, what: str) -> None:
    world.drop("evaluate", TWO[0])
    hidden = world.home if what == "store" else QUICKSTART / "base"
    there = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--block"]
    mine = " ".join([*there, "--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats"])
    hide = f'mount -t tmpfs none "{hidden}" && exec {mine}'  # a mount of its own over it
    count = len(cluster.alive())
    argv = cluster.inside(["unshare", "--mount", "sh", "-c", hide])
    env = {**os.environ, "RAY_worker_niceness": NICE}
    node = subprocess.Popen(argv, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(cluster.alive()) > count, node)
        said = refused(world, cluster)
    finally:
        node.terminate()  # `ray start --block` ends what it started
        node.wait(60)
    if what == "store":
        assert "A node does not have the same store." in said and "QUENCH_STORE=s3://" in said, said
    else:
        assert "A node does not have what the recipe reads." in said and str(hidden) in said, said
    assert said.count("error:") == 1
    assert not list((world.home / "cluster").iterdir())


@pytest.mark.slow
@pytest.mark.system
def test_a_node_whose_clock_is_wrong_is_refused(world: World, cluster: RayCluster, tmp_path: Path) -> None:
    if not (libraries := list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))):
        pytest.skip("a node with another time: apt-get install faketime")
    world.drop("evaluate", TWO[0])
    count = len(cluster.alive())
    # Ray empties LD_PRELOAD: each Python of that node starts itself again with it.
    again = (
        'os.environ.get("LD_PRELOAD") or os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_PRELOAD": LATE})'
    )
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nLATE = {str(libraries[0])!r}\n{again}\n")
    late = {"FAKETIME": "-600s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    node = cluster.add(PYTHONPATH=str(tmp_path), **late)
    try:
        wait_for(lambda: len(cluster.alive()) > count, cluster.process)
        said = refused(world, cluster)
    finally:
        cluster.kill(node)
        wait_for(lambda: node not in cluster.alive(), cluster.process)
    assert "A node has another time." in said and "behind this machine's" in said and f"node {node[:8]}" in said
    assert said.count("error:") == 1 and not children(world)


@pytest.mark.slow
@pytest.mark.system
def test_a_step_that_no_node_can_take_is_refused(world: World, cluster: RayCluster) -> None:
    world.drop("evaluate", TWO[0])
    said = refused(world, cluster, "--set", "run.threads=2", *UNMEASURED, QUENCH_CPU_SLOTS="2")  # nodes have one
    assert f"No node can take evaluate/{TWO[0]}." in said and "It needs 2 CPU" in said and "run.threads" in said


def test_a_node_that_does_not_reach_prefect_is_refused(tmp_path: Path) -> None:
    from flows.cluster.node import Node, NodeQuery, NodeReport, Place
    from flows.cluster.preflight import Here, differs

    api = f"http://127.0.0.1:{free_port()}/api"
    place = Place(home=tmp_path, bucket=None)
    query = NodeQuery(place=place, token="", sizes={}, environments=[], names=[], api=api)
    report = NodeReport(
        node=Node(host="far", address="10.0.0.2", id="a" * 56),
        code="same",
        locked={},
        installed={},
        sees_token=True,
        other=[],
        hears_prefect=answers(api),
        clock=0.0,
    )
    same = Here(code="same", locked={}, installed={})
    (problem,) = differs(report, same, query)
    assert problem.what == "A node does not reach Prefect." and api in problem.why
    assert "far" in problem.where and "quench up --host" in problem.next

    # Arms are scored on L4 or A100 here. What a node has otherwise counts only where arms are scored on GPUs.
    scored = same._replace(gpus=("A100, compute 8.0 or L4, compute 8.9",))
    for gpus, refused in (((), False), (("L4, compute 8.9",), False), (("T4, compute 7.5", "L4, compute 8.9"), True)):
        there = replace(report, gpus=gpus, hears_prefect=True)
        assert list(differs(there, same, query)) == []
        assert ["T4, compute 7.5 there" in problem.why for problem in differs(there, scored, query)] == [True] * refused


@pytest.mark.parametrize("what", ["nothing", "another server", "a client's address"])
def test_an_address_where_no_ray_answers_is_refused(what: str) -> None:
    from flows.cluster.preflight import joined

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = free_port() if what == "nothing" else server.server_address[1]
        address = f"ray://127.0.0.1:{port}" if what.startswith("a client") else f"127.0.0.1:{port}"
        with pytest.raises(RecipeError) as caught, joined(address):
            raise AssertionError("joined")
        server.shutdown()
    (problem,) = caught.value.problems
    told = json.dumps(problem.as_dict())
    assert ("ray://" in told if what.startswith("a client") else "No Ray answers." in told) and "--address" in told
