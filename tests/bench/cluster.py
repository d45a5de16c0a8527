"""`python -m tests.bench.cluster`: one recipe in one process, on two Ray nodes, and with its store in a bucket.

Real parts on loopback, in a network namespace of their own (root): Ray, Prefect's server, moto's S3 server. Each way
has an empty home. Writes docs/results/cluster.md at the end; a folder that is given again goes on where it stood.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import hardware
from tests.conftest import QUICKSTART, write_small_recipe
from tests.ray_cluster import RayCluster, ray_cluster
from tests.s3_server import S3Server, s3_server

PAGE = CHECKOUT / "docs" / "results" / "cluster.md"
ONE, RAY, S3, BOTH = "one process", "Ray, two nodes", "one process, S3", "Ray, two nodes, S3"
INSIDE = "--inside"
SLOTS = "2"  # of one process: as many as the two nodes have together


class Way(NamedTuple):
    """How a recipe was run, and what came of it.

    Attributes:
        wall_s: Of the command, from its start to its end.
        idle_s: Of these, without a child at work: start, preflight, transfers, placing, report.
        child_s: Sum over the children.
        digests: Step -> digest of its bytes.
        nodes: Step -> node, on Ray.
    """

    name: str
    wall_s: float
    idle_s: float
    child_s: float
    digests: dict[str, str]
    nodes: dict[str, str]


def run(name: str, words: list[str], folder: Path, cluster: RayCluster, server: S3Server) -> Way:
    """Run the recipe in a home of its own, unless that was done before; words are its path and options."""
    home, done = folder / name.replace(", ", "-").replace(" ", "-"), folder / f"{name}.json"
    if done.exists():
        return Way(*json.loads(done.read_text()))
    shutil.rmtree(home, ignore_errors=True)  # of a try that ended in the middle: its time is not known
    home.mkdir()
    env = {**os.environ, "QUENCH_HOME": str(home), "PREFECT_API_URL": cluster.api, "QUENCH_CPU_SLOTS": SLOTS}
    words = ["run", *words, "--set", "measure.enabled=false"]  # its identity is this machine's
    if name in (RAY, BOTH):
        words += ["--runner", "ray", "--address", cluster.address]
    if name in (S3, BOTH):
        env |= server.env(server.bucket("ray" if name == BOTH else "one"))
    clock = time.monotonic()
    subprocess.run([sys.executable, "-m", "flows.cli", *words], env=env, cwd=folder, check=True)
    wall = time.monotonic() - clock
    steps = json.loads((home / "runs" / "latest" / "report.json").read_text())["steps"]
    made = [json.loads((home / one["path"] / "manifest.json").read_text()) for one in steps]
    way = Way(
        name=name,
        wall_s=wall,
        idle_s=max(0.0, wall - busy_s(made)),
        child_s=sum(one["seconds"] for one in made),
        digests={one["key"]: one["digest"] for one in steps},
        nodes={one["key"]: one["node"]["id"][:8] for one in steps if "node" in one},
    )
    done.write_text(json.dumps(way))
    return way


def busy_s(made: list[dict[str, Any]]) -> float:
    """Seconds in which at least one child was at work, from the manifests' times, which are whole seconds."""
    times = sorted((_at(one["started_at"]), _at(one["finished_at"])) for one in made)
    busy = reached = 0.0
    for start, end in times:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def _at(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()


def page(ways: list[Way], *, recipe: str) -> str:
    """The page."""
    first = ways[0]
    lines = [
        "<!-- Written by `python -m tests.bench.cluster`. -->",
        "# One recipe in one process, on Ray, and with its store in a bucket, measured",
        "",
        f"{recipe}, {len(first.digests)} steps without `measure`, each way once in an empty home, "
        "one thread per child.",
        f"The process has {SLOTS} CPU slots. The two Ray nodes have one each and lie on the same machine, so they can",
        "bring no speed here: the table shows what they cost. Prefect's server and Ray's daemons run beside all ways.",
        "",
        "| | wall, s | without a child at work, s | children, s | digests as in one process | steps a node |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for way in ways:
        same = sum(way.digests[key] == digest for key, digest in first.digests.items())
        share = ", ".join(str(list(way.nodes.values()).count(node)) for node in sorted(set(way.nodes.values()))) or "–"
        cells = [way.name, f"{way.wall_s:.0f}", f"{way.idle_s:.0f}", f"{way.child_s:.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{same} of {len(first.digests)}', share])} |")
    lines += ["", *differing(ways), "", machine(), ""]
    return "\n".join(lines)


def differing(ways: list[Way]) -> list[str]:
    """Which steps have other bytes than in one process."""
    first, found = ways[0], []
    for way in ways[1:]:
        if other := [key for key, digest in first.digests.items() if way.digests[key] != digest]:
            found.append(f"{way.name}: other bytes in {', '.join(other)}.")
    return found or ["Every step has the same bytes in every way."]


def machine() -> str:
    """Hardware and versions, the last line."""
    here, versions = hardware(), locked_versions()
    names = ("torch", "transformers", "prefect", "ray", "prefect-ray", "boto3")
    return f"{here['cpu']}, {here['cores']} cores; {', '.join(f'{name} {versions[name]}' for name in names)}."


def main() -> int:
    """Run all ways, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a recipe of eight stages in minutes; writes no page")
    parser.add_argument("--folder", type=Path, help="homes lie here and stay; default: a new one that goes")
    parser.add_argument("--set", action="append", default=[], help="more of the recipe, in every way; on the page")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:  # Ray listens on all interfaces: here there is only loopback
        os.execvp("unshare", ["unshare", "--net", sys.executable, "-m", "tests.bench.cluster", *sys.argv[1:], INSIDE])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="quench-cluster-"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = QUICKSTART / "recipe.yaml"
    if args.small and not (recipe := folder / "small" / "recipe.yaml").exists():
        write_small_recipe(recipe.parent)
    words = [str(recipe), *(word for one in args.set for word in ("--set", one))]
    asked = folder / "asked.json"
    if asked.exists() and json.loads(asked.read_text()) != words:
        raise SystemExit(f"{folder}: begun with other words: {asked.read_text()}")
    asked.write_text(json.dumps(words))
    with s3_server(folder / "s3") as server:
        env = {**server.env(""), "QUENCH_CPU_SLOTS": SLOTS, "QUENCH_HOME": str(folder / "node")}
        del env["QUENCH_STORE"]
        with ray_cluster(own_network=False, **env) as cluster:
            ways = [run(name, words, folder, cluster, server) for name in (ONE, RAY, S3, BOTH)]
    about = "A small recipe" if args.small else "The quickstart's recipe"
    if args.set:
        about += f" with {', '.join(f'`{one}`' for one in args.set)}"
    text = page(ways, recipe=about)
    print(text)
    if not args.small:
        PAGE.write_text(text, encoding="utf-8")
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
