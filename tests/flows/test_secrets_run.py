"""Secrets are planted in the environment, runs succeed and fail with them: nothing that is written or printed has one.

The same processes show that nothing of ours listens anywhere but on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.process.ports import free_port
from tests.conftest import QUICKSTART, World, write_small_recipe
from tests.flows.listening import Listening
from tests.flows.service.test_up import Project
from tests.flows.test_resume import processes_of
from tests.hub import Hub, read_folder
from tests.mlflow_server import mlflow_server

pytestmark = pytest.mark.slow  # a whole small run, and `quench up`
MARK = "PlantedSecret"
SECRETS = {
    "HF_TOKEN": f"hf_{MARK}xQzVwKjPbTgXnRmDcZhub",
    "MLFLOW_TRACKING_TOKEN": f"{MARK}-mlflow-token",
    "AWS_ACCESS_KEY_ID": f"{MARK}-aws-id",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}-aws-secret",
    "OTHER_API_KEY": f"{MARK}-other",
    "DATABASE_URL": f"postgresql://me:{MARK}-database@127.0.0.1/x",
}
IN_URL = f"{MARK}-mlflow-password"
BLOCK = f"hf_{MARK}kWxJvQbZtGpYzNcRblock"
PLAIN = "NotASecretButSeen"  # shows that the search finds what children see and print
DUMP = """
import os, sys

def score(answer, reference, columns):
    print("child sees", dict(os.environ), file=sys.stderr, flush=True)
    raise RuntimeError(f"environment: {dict(os.environ)}")
"""


@dataclass
class Seen:
    """What was done in one home: exit codes, what was printed, and who listened."""

    world: World
    folder: Path
    listening: Listening
    printed: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    project: Project | None = None
    hub: Hub | None = None

    def files(self) -> dict[str, bytes]:
        return read_folder(self.folder)


def quench(seen: Seen, name: str, *words: str) -> None:
    world = seen.world
    seen.printed[name] = subprocess.run(
        world.argv(*words), env=world.env, cwd=seen.folder, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Everything of this file's tests, done once."""
    folder = tmp_path_factory.mktemp("planted")
    recipe = write_small_recipe(folder / "recipe")  # a folder named recipes would stand in for ours: refused
    (recipe.parent / "dump.py").write_text(DUMP)
    world = World(home=folder / "home", recipe=recipe, api="")
    world.home.mkdir()
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, Hub() as hub:
        for name, value in {**SECRETS, "SEEN_BY_CHILDREN": PLAIN}.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", f"http://me:{IN_URL}@127.0.0.1:{port}")
        patch.setenv("NO_PROXY", "127.0.0.1")
        made = Seen(world=world, folder=folder, listening=Listening(world.home), hub=hub)
        scorers = "evaluate.scorers=[{kind: exact-match}, {kind: python, name: dump, callable: dump.py:score}]"
        dump = [str(recipe), "--set", scorers, "--allow-python", str(recipe.parent / "dump.py")]
        theirs = ("--artifacts-destination", str(folder / "theirs"))
        with made.listening:
            with mlflow_server(folder, *theirs, database=f"sqlite:///{folder / 'theirs.db'}", port=port):
                quench(made, "run", "run", str(recipe))
                quench(made, "fails", "run", *dump)
            quench(made, "no mlflow", "run", str(recipe))
            patch.delenv("MLFLOW_TRACKING_URI")
            in_up(made, patch, hub)
        yield made
        for pid in processes_of(made.project.home if made.project else world.home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def in_up(made: Seen, patch: pytest.MonkeyPatch, hub: Hub) -> None:
    """`quench up` with no hub token but the Secret block's; one run that fails, one of a gated base."""
    patch.delenv("HF_TOKEN")
    patch.delenv("HF_HUB_OFFLINE", raising=False)  # jobs set it, and a test before may have run one in this process
    hub.add("org/gated", QUICKSTART / "base", gated=True)
    hub.tokens = {BLOCK: {"org/gated"}}
    for name, value in hub.env(made.folder / "hf").items():
        patch.setenv(name, value)
    project = made.project = Project(made.folder / "project")
    project.take(made.world)
    made.listening.home = project.home
    process = project.up("--allow-python", str(project.folder / "dump.py"))
    save = f"from prefect.blocks.system import Secret; Secret(value={BLOCK!r}).save('quench-hf-token')"
    api = json.loads((project.home / "up.json").read_text())["prefect"]
    subprocess.run([sys.executable, "-c", save], env={**project.env, "PREFECT_API_URL": api}, check=True, timeout=120)
    scorers = 'sets=["evaluate.scorers=[{kind: exact-match}, {kind: python, name: dump, callable: dump.py:score}]"]'
    made.printed["up fails"] = project.prefect("--param", "recipe=recipe.yaml", "--param", scorers, "--watch")
    # Refused after it was pinned: no training for this.
    gated = 'sets=["model.base=org/gated", "train.targets=[q_prj]"]'
    made.printed["up gated"] = project.prefect("--param", "recipe=recipe.yaml", "--param", gated, "--watch")
    process.terminate()
    assert process.wait(60) == 0


def test_the_runs_end_as_they_were_meant_to(seen: Seen) -> None:
    codes = {name: done.returncode for name, done in seen.printed.items()}
    assert codes == {"run": 0, "fails": 1, "no mlflow": codes["no mlflow"], "up fails": 1, "up gated": 1}, seen.printed
    assert codes["no mlflow"] != 0 and "MLflow" in seen.printed["no mlflow"].stderr
    assert "q_prj" in seen.printed["up gated"].stdout + seen.printed["up gated"].stderr


def test_nothing_that_was_written_or_printed_has_a_secret(seen: Seen) -> None:
    kept = seen.files()
    for word in ("prefect.db", "theirs.db", "mlflow.db", "job.json", "events.jsonl", "report.html", "worker.log"):
        assert any(word in name for name in kept), f"{word} was not searched"
    assert len(kept) > 200
    found = [name for name, data in kept.items() if MARK.encode() in data]
    assert found == []
    assert [name for name, done in seen.printed.items() if MARK in done.stdout + done.stderr] == []


def test_the_search_would_have_found_it(seen: Seen) -> None:
    """What children may see goes everywhere: their logs, the run's record, Prefect's database, the terminal."""
    places = [name for name, data in seen.files().items() if PLAIN.encode() in data]
    for part in ("log.txt", "steps.json", "prefect.db", "report.json"):
        assert any(part in name for name in places), (part, places)
    assert PLAIN in seen.printed["up fails"].stdout + seen.printed["up fails"].stderr


def test_mlflow_took_the_run_all_the_same(seen: Seen) -> None:
    """MLflow took the run: user and password went as a header, not in the address."""
    with contextlib.closing(sqlite3.connect(seen.folder / "theirs.db")) as database:
        ((finished,),) = database.execute("select count(*) from runs where status = 'FINISHED'").fetchall()
    assert finished > 10


def test_the_hub_token_came_from_the_secret_block(seen: Seen) -> None:
    assert seen.hub is not None
    asked = [one for one in seen.hub.seen if "org/gated" in one.path and one.server == "hub"]
    assert asked and {one.token for one in asked} == {BLOCK}
    assert not [one for one in seen.hub.seen if one.server == "storage" and one.token]
    told = seen.printed["up gated"].stdout + seen.printed["up gated"].stderr
    assert "HF_TOKEN is taken from the Secret block quench-hf-token" in told


def test_everything_listens_on_loopback_alone(seen: Seen) -> None:
    who = " ".join(word for words in seen.listening.seen.values() for word in words)
    assert "prefect server start" in who and "mlflow" in who, seen.listening.seen
    assert seen.listening.elsewhere == {}
    assert str(CHECKOUT) in who or "prefect" in who


def test_a_servers_other_address_is_seen(tmp_path: Path) -> None:
    """The look-out finds what listens elsewhere: here at the machine's own name for all addresses."""
    code = f"import socket, time; s = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); time.sleep(30) # {tmp_path}"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        listening = Listening(tmp_path)
        for _ in range(100):
            listening.look()
            if listening.elsewhere:
                break
        process.kill()
    assert listening.elsewhere
