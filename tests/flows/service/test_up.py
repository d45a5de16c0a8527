"""`quench up` with its real servers: the user's command, Ctrl-C, SIGKILL, and what the next start finds."""

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from flows.service.postgres import stores
from flows.service.up import UpOptions, exposed, taken_port, up
from recipes.problem import RecipeError
from tasks.runtime.process.ports import free_port
from tests.conftest import UNUSUAL, World
from tests.flows.test_resume import GONE_S, processes_of, wait_gone
from tests.hub import read_folder
from tests.postgres_server import postgres_server

READY = r"ready  prefect (http://127\.0\.0\.1:\d+)  mlflow (http://127\.0\.0\.1:\d+)"
START_S = 120  # 20 s on two idle cores
PYPROJECT = "[tool.prefect.plugins]\nenabled = true\n"
NO_SPEED = 'sets=["measure.enabled=false"]'


class Project:
    """A folder as `quench init` leaves it, with `quench up` in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / ".quench"
        folder.mkdir(parents=True)
        self.home.mkdir()
        (folder / "pyproject.toml").write_text(PYPROJECT)
        # No variable of the tests' own server, and none that names the home: the folder does.
        self.env = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "QUENCH_"))}
        self.env |= {"QUENCH_CPU_SLOTS": "1", "COLUMNS": "300", "XDG_STATE_HOME": str(folder / "state")}
        self.out = folder / "up.out"

    def take(self, world: World) -> None:
        """Let a finished run be that of this folder's recipe."""
        self.home.rmdir()
        world.home.rename(self.home)
        for path in world.recipe.parent.iterdir():
            if path.is_file():  # and not the __pycache__ of a scorer
                (self.folder / path.name).write_bytes(path.read_bytes())

    def up(self, *more: str) -> subprocess.Popen[bytes]:
        """Start `quench up` and wait for its ready line."""
        with self.out.open("wb") as out:
            words = [sys.executable, "-m", "flows.cli", "up", *more]
            process = subprocess.Popen(words, cwd=self.folder, env=self.env, stdout=out, stderr=out)
        deadline = time.monotonic() + START_S
        while not re.search(READY, self.out.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.1)
        return process

    def prefect(
        self, *words: str, name: str = "finetune-and-quantize", folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Type `prefect deployment run NAME ...` in the folder."""
        program = str(Path(sys.executable).with_name("prefect"))
        return subprocess.run(
            [program, "deployment", "run", name, *words],
            cwd=folder or self.folder,
            env={**self.env, "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def kill(self) -> None:
        """Kill what a failed test left."""
        for pid in processes_of(self.home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def states(self) -> list[str]:
        """States of all flow runs, oldest first, as the database has them."""
        with contextlib.closing(sqlite3.connect(self.home / "prefect" / "prefect.db")) as database:
            return [name for (name,) in database.execute("select state_name from flow_run order by created")]

    def mlflow_states(self) -> set[str]:
        """States of all runs that MLflow shows."""
        with contextlib.closing(sqlite3.connect(self.home / "mlflow.db")) as database:
            rows = database.execute("select status from runs where lifecycle_stage = 'active'")
            return {name for (name,) in rows}

    def run_status(self) -> str:
        """Status of the newest run's record."""
        runs = sorted(path for path in (self.home / "runs").iterdir() if path.name != "latest")
        return json.loads((runs[-1] / "steps.json").read_text())["status"]

    def wait_training(self) -> None:
        """Return when a child trains."""
        deadline = time.monotonic() + START_S
        while not any("partial/train/" in words for words in processes_of(self.home).values()):
            assert time.monotonic() < deadline, (self.home / "up" / "worker.log").read_text()
            time.sleep(0.1)


@pytest.fixture
def project(world: World, tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path / f"project in {UNUSUAL}")
    made.take(world)
    yield made
    made.kill()


def test_the_users_command_runs_through_and_ctrl_c_leaves_nothing(project: Project):
    process = project.up()
    told = json.loads((project.home / "up.json").read_text())
    assert told["deployments"] == ["finetune-and-quantize/default", "evaluate-only/default", "retrain/default"]
    second = subprocess.run(
        [sys.executable, "-m", "flows.cli", "up"], cwd=project.folder, env=project.env, capture_output=True, text=True
    )
    assert second.returncode == 2 and f"process {process.pid}" in second.stderr
    ran = project.prefect("--param", "recipe=recipe.yaml", "--param", NO_SPEED, "--watch")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "report.html" in ran.stdout  # the flow's log came along
    steps = json.loads((project.home / "runs" / "latest" / "steps.json").read_text())
    assert {one["status"] for one in steps["steps"]} == {"hit"} and steps["status"] == "completed"
    clock = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    wait_gone(project.home)
    assert time.monotonic() - clock < GONE_S
    assert project.states() == ["Completed"]
    assert not (project.home / "up.json").exists()


@pytest.mark.slow
def test_stopped_and_killed_with_a_run_under_way(project: Project):
    for folder in (project.home / "store" / "train").iterdir():
        folder.rename(project.home / folder.name)
    words = ("--param", "recipe=recipe.yaml", "--param", NO_SPEED)
    process = project.up()
    assert project.prefect(*words).returncode == 0
    project.wait_training()
    process.kill()
    process.wait()
    wait_gone(project.home)
    run = subprocess.Popen(  # with a server of its own, on the same database
        [sys.executable, "-m", "flows.cli", "run", "recipe.yaml"],
        cwd=project.folder,
        env=project.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    project.wait_training()
    run.kill()
    run.wait()
    wait_gone(project.home)
    assert project.states() == ["Running", "Running"]

    process = project.up()  # finds what the killed ones left
    assert "marked as crashed: recipe.yaml, which nobody executes any more" in project.out.read_text()
    assert project.states() == ["Crashed", "Crashed"]
    assert project.run_status() == "stopped"
    assert "RUNNING" not in project.mlflow_states()
    assert project.prefect(*words).returncode == 0
    project.wait_training()
    clock = time.monotonic()
    process.terminate()
    assert process.wait(60) == 0
    wait_gone(project.home)
    assert time.monotonic() - clock < GONE_S
    assert project.states() == ["Crashed", "Crashed", "Crashed"]
    assert project.run_status() == "stopped"
    assert "RUNNING" not in project.mlflow_states()


@pytest.mark.slow
def test_a_part_that_ends_is_started_again_and_its_runs_are_marked(project: Project):
    for folder in (project.home / "store" / "train").iterdir():
        folder.rename(project.home / folder.name)
    process = project.up()
    assert project.prefect("--param", "recipe=recipe.yaml", "--param", NO_SPEED).returncode == 0
    project.wait_training()
    (worker,) = [
        pid
        for pid, words in processes_of(project.home).items()
        if "bin/prefect worker" in words and "guard" not in words
    ]
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + START_S
    while project.states() != ["Crashed"]:
        assert time.monotonic() < deadline, project.out.read_text()
        time.sleep(0.2)
    assert "worker ended and is started again" in project.out.read_text()
    assert not any("partial/train/" in words for words in processes_of(project.home).values())
    ran = project.prefect("--param", "recipe=recipe.yaml", "--param", NO_SPEED, "--watch")
    assert ran.returncode == 0, ran.stdout
    process.terminate()
    assert process.wait(60) == 0
    wait_gone(project.home)


@pytest.mark.slow
def test_wrong_input_is_refused_with_everything_that_is_wrong(project: Project):
    recipe = (project.folder / "recipe.yaml").read_text()
    (project.folder / "bad.yaml").write_text(
        recipe.replace("rank: 8", "rank: -8").replace("seq_len: 512", "seq_len: x")
    )
    process = project.up()
    # A folder with no home of its own finds the only `quench up`; relative paths are seen from it.
    other = project.folder.with_name("other")
    other.mkdir()
    (other / "pyproject.toml").write_text(PYPROJECT)
    (other / "worse.yaml").write_text(recipe.replace("rank: 8", "rank: -9"))
    elsewhere = project.prefect("--param", "recipe=worse.yaml", "--watch", folder=other)
    assert elsewhere.returncode == 1 and "`train.rank` is -9" in elsewhere.stdout, elsewhere.stderr
    for name in ("finetune-and-quantize", "finetune-and-quantize/default"):
        refused = project.prefect("--param", "recipe=bad.yaml", "--watch", name=name)
        assert refused.returncode == 1
        assert "train.rank" in refused.stdout and "calibrate.seq_len" in refused.stdout
    missing = project.prefect("--param", "recipe=none.yaml", "--watch")
    assert missing.returncode == 1 and "none.yaml cannot be read" in missing.stdout
    unknown = project.prefect("--param", "recipe=recipe.yaml", "--param", "nonsense=1")
    assert unknown.returncode == 1 and "nonsense" in unknown.stdout + unknown.stderr
    for folder in (project.home / "store" / "quantize").glob("gptq-*"):
        folder.rename(project.home / folder.name)
    unmade = project.prefect("--param", "recipe=recipe.yaml", "--watch", name="evaluate-only")
    assert unmade.returncode == 1 and "quantize/gptq-w4-g128 is not in the store" in unmade.stdout
    process.terminate()
    assert process.wait(60) == 0
    assert project.states() == ["Failed"] * 5


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """URL of an empty database."""
    with postgres_server(tmp_path.parent / f"{tmp_path.name}-postgres") as url:
        yield url


@pytest.mark.system
def test_both_servers_on_postgresql(project: Project, postgres: str):
    process = project.up("--postgres", postgres.replace("quench@", "quench:PlantedPassword@"))
    ran = project.prefect("--param", "recipe=recipe.yaml", "--param", NO_SPEED, "--watch")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    database = psycopg2.connect(postgres)
    with database.cursor() as cursor:
        cursor.execute("select state_name from flow_run")
        assert cursor.fetchall() == [("Completed",)]
        cursor.execute("select count(*) from mlflow.runs where status = 'FINISHED'")
        assert cursor.fetchone()[0] > 10
    database.close()
    weights = list((project.home / "mlartifacts").rglob("*.safetensors"))
    assert weights and all(path.stat().st_nlink > 1 for path in weights)
    assert not list(project.home.rglob("*.db"))
    process.terminate()
    assert process.wait(60) == 0
    wait_gone(project.home)
    kept = read_folder(project.folder)
    assert any("worker.log" in name for name in kept) and any("up.out" in name for name in kept)
    assert [name for name, data in kept.items() if b"PlantedPassword" in data] == []
    assert "PlantedPassword" not in ran.stdout + ran.stderr


def test_what_is_no_postgresql_is_refused_without_its_password():
    for url in ("mysql://a:geheim@127.0.0.1/x", f"postgresql://a:geheim@127.0.0.1:{free_port()}/x"):
        with pytest.raises(RecipeError) as caught:
            stores(url)
        assert "PostgreSQL" in str(caught.value) and "geheim" not in str(caught.value)


def test_a_wanted_port_that_is_taken_is_refused_and_a_usual_one_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(RecipeError, match=f"port {port} is taken"),
            taken_port("127.0.0.1", port, 4200, option="--prefect-port"),
        ):
            pass
        with taken_port("127.0.0.1", None, port, option="--prefect-port") as other:
            assert other > port


def test_a_port_is_claimed_before_its_server_listens():
    port = free_port()
    with (
        taken_port("127.0.0.1", None, port, option="--prefect-port") as first,
        taken_port("127.0.0.1", None, port, option="--mlflow-port") as second,
    ):
        assert port == first < second
    with taken_port("127.0.0.1", None, port, option="--prefect-port") as again:
        assert again == port


def test_a_taken_port_starts_nothing(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError):
            up(tmp_path / "home", UpOptions(mlflow_port=taken.getsockname()[1]), say=lambda text: None)
    assert not processes_of(tmp_path / "home")


def test_another_host_says_what_it_exposes():
    assert "without a password" in exposed("0.0.0.0", 4200, 5000) and "4200" in exposed("0.0.0.0", 4200, 5000)
