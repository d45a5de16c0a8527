"""A Ray cluster of two nodes on loopback, in a network namespace of its own: `ray start` listens on all interfaces.

Run as a program it is that namespace's first process: it starts the nodes and a Prefect server, says where they are,
and does what it reads: `kill N`, `add ENVIRONMENT`. When there is no more to read it ends, and all of it with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.run.server import OwnServer, prefect_settings
from tasks.runtime.process.launch import CHECKOUT, Launcher

NODES = 2
NICE = "0"  # not 15: beside other work on two cores a worker would take minutes to start


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A running cluster. api: Of the Prefect server beside it."""

    process: subprocess.Popen[str]
    address: str
    api: str

    def inside(self, argv: list[str]) -> list[str]:
        """A command line in the cluster's network namespace."""
        return ["nsenter", "-t", str(self.process.pid), "--net", "--", *argv]

    def do(self, *words: str) -> Any:
        """Have the cluster's process do something; returns its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self, node: str) -> None:
        """End a node at once, by its id."""
        assert self.do("kill", node) == node

    def add(self, **env: str) -> str:
        """Start one more node, with these variables in its environment; returns its id."""
        return self.do("add", json.dumps(env))

    @property
    def nodes(self) -> list[str]:
        """Ids of the nodes that this has started and not killed, the head's first."""
        return self.do("nodes")

    def alive(self) -> list[str]:
        """Ids of all nodes that Ray knows to be alive."""
        return self.do("alive")


@contextlib.contextmanager
def ray_cluster(*, own_network: bool = True, **env: str) -> Iterator[RayCluster]:
    """Run a cluster while the body runs; skips where no network namespace can be made.

    Args:
        own_network: Make a namespace; False where this process is in one already.
        env: More environment variables of all nodes.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("a cluster on loopback alone needs root, and Debian's util-linux and iproute2")
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: it has sockets in it
    (folder / "ray").mkdir()  # where Ray notes the address, below RAY_TMPDIR
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*(("unshare", "--net") if own_network else ()), sys.executable, "-m", "tests.ray_cluster", str(folder)],
            cwd=CHECKOUT,
            env={
                **os.environ,
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_worker_niceness": NICE,
                "RAY_TMPDIR": str(folder),
                **env,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin and process.stdout
    try:
        told = process.stdout.readline()
        assert told, (folder / "log.txt").read_text()
        yield RayCluster(process=process, **json.loads(told))
    finally:
        process.stdin.close()  # it ends its nodes when nobody can ask for more
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _serve(folder: Path) -> None:
    """Body of the cluster's own process."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    from ray.cluster_utils import Cluster

    answers, sys.stdout = sys.stdout, sys.stderr  # Ray prints
    with Launcher() as launcher:
        os.environ.pop("PREFECT_API_URL", None)
        os.environ.update(prefect_settings(folder))
        server = OwnServer(folder, launcher)
        server.start()
        node: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
        cluster = Cluster(
            initialize_head=True, head_node_args={**node, "include_dashboard": False, "temp_dir": str(folder)}
        )
        for _ in range(NODES - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        server.wait()
        print(json.dumps({"address": cluster.address, "api": server.api}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_do(cluster, node, *json.loads(line))), file=answers, flush=True)
        cluster.shutdown()


def _do(cluster: Any, node: Mapping[str, Any], what: str, about: str = "") -> Any:
    every = {one.node_id: one for one in (cluster.head_node, *cluster.worker_nodes)}
    if what == "kill":
        cluster.remove_node(every[about], allow_graceful=False)
        return about
    if what == "add":
        made = cluster.add_node(**node, env_vars=json.loads(about))
        cluster.wait_for_nodes()
        return made.node_id
    if what == "alive":
        return [one["NodeID"] for one in cluster.global_state.node_table() if one["Alive"]]
    return list(every)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
