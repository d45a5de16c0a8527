"""What happens when something that a run leans on goes away: MLflow, Prefect's server, the process, the disk."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from flows.mlflow_uri import silent
from flows.run.folder import run_files
from tasks.runtime.process.disk import LEAST_BYTES
from tasks.runtime.process.ports import free_port
from tests.conftest import World
from tests.flows.service.test_up import NO_SPEED, START_S, Project, project  # noqa: F401  the fixture
from tests.flows.test_resume import asked, processes_of, start, wait_child, wait_gone
from tests.flows.test_run import fingerprints

FAST = ("--set", "measure.enabled=false")
MIB = 1 << 20


class MlflowServer:
    """A real MLflow server on loopback that can be killed and started again on the same database and port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self) -> None:
        program = str(Path(sys.executable).with_name("mlflow"))
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        files = ["--no-serve-artifacts", "--default-artifact-root", (self.folder / "artifacts").as_uri()]
        own = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder / 'mlflow.db'}"}
        env = {**os.environ, **own, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [program, *words, *files], env=env, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while silent(self.uri):
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log.txt").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def client(self) -> MlflowClient:
        """Reads the database itself, so that a test does not depend on the server."""
        return MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def runs(self, run: str, view: int = ViewType.ACTIVE_ONLY) -> dict[str, str]:
        """Id of each MLflow run of one of ours, by name."""
        client = self.client
        experiments = [one.experiment_id for one in client.search_experiments()]
        found = client.search_runs(experiments, f"tags.`quench.run` = '{run}'", view, max_results=1000)
        assert len({run.info.run_name for run in found}) == len(found)
        return {run.info.run_name: run.info.run_id for run in found}

    def curves(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Each curve of the run, points in the order in which MLflow has them."""
        client = self.client
        names = [name for name in client.get_run(run).data.metrics if name.startswith("train/")]
        return {name: [(p.step, p.value) for p in client.get_metric_history(run, name)] for name in names}


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "mlflow")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def tracked(world: World, mlflow: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world that writes to that server, and has to train."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
    world.drop("train")
    return world


def told(home: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve of the training, as its events file has it."""
    (path,) = (home / "store" / "train").glob("*/files/events.jsonl")
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "metric" and event["name"].startswith("train/"):
            curves.setdefault(event["name"], []).append((event["step"], event["value"]))
    return curves


def wait_points(world: World, run: subprocess.Popen[str], wanted: int) -> None:
    """Return when the training has told so many points."""
    deadline = time.monotonic() + START_S
    while True:
        paths = list((world.home / "partial" / "train").glob("*/files/events.jsonl"))
        if paths and paths[0].read_text().count('"metric"') >= wanted:
            return
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.02)


def latest(world: World) -> str:
    return (world.home / "runs" / "latest").resolve().name


def test_mlflow_that_is_down_at_the_start_is_refused_before_anything_is_started(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    world.drop("train")
    before = set((world.home / "runs").iterdir())
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refused = world.quench("run", str(world.recipe), check=2).stderr
    assert "MLflow does not answer" in refused and uri in refused and "unset MLFLOW_TRACKING_URI" in refused
    assert "Prefect, while this runs" not in refused
    assert set((world.home / "runs").iterdir()) == before and not list((world.home / "partial").glob("*/*"))


@pytest.mark.slow
def test_mlflow_that_comes_back_gets_all_of_a_run_in_order_and_once(tracked: World, mlflow: MlflowServer):
    tracked.drop("quantize", "rtn")
    run = start(tracked, *FAST)
    wait_points(tracked, run, 3)
    mlflow.kill()
    child = wait_child(tracked, "quantize", run)  # the training was committed without MLflow
    os.kill(child, signal.SIGSTOP)
    time.sleep(15)  # three tries of each call take 3 s: what was to be told of the training has failed by then
    mlflow.start()
    os.kill(child, signal.SIGCONT)
    out, _ = run.communicate(timeout=1200)
    assert run.returncode == 0 and "MLflow is behind" not in out, out
    name = latest(tracked)
    assert mlflow.runs(name, ViewType.DELETED_ONLY)  # what the outage had cut off was written anew
    assert mlflow.curves(mlflow.runs(name)["train/small"]) == told(tracked.home)
    assert name not in json.loads(tracked.quench("track", "sync", "--json").stdout)["written"]


@pytest.mark.slow
def test_mlflow_that_stays_away_costs_the_run_nothing_and_sync_sends_it_once(tracked: World, mlflow: MlflowServer):
    run = start(tracked, *FAST)
    wait_points(tracked, run, 3)
    mlflow.kill()
    out, _ = run.communicate(timeout=1200)
    assert run.returncode == 0 and "MLflow is behind (`quench track sync` sends it)" in out, out
    assert (tracked.home / "runs" / "latest" / "report.html").exists()
    mlflow.start()
    name = latest(tracked)
    assert name in json.loads(tracked.quench("track", "sync", "--json").stdout)["written"]
    runs = mlflow.runs(name)
    assert mlflow.curves(runs["train/small"]) == told(tracked.home)
    assert json.loads(tracked.quench("track", "sync", "--json").stdout)["written"] == []
    assert mlflow.runs(name) == runs


@pytest.mark.slow
def test_prefects_server_or_the_executing_process_killed_under_up(project: Project):  # noqa: F811
    words = ("--param", "recipe=recipe.yaml", "--param", NO_SPEED)

    def untrain(name: str) -> None:
        for folder in (project.home / "store" / "train").iterdir():
            folder.rename(project.home / name)

    def kill(what: str) -> None:
        (pid,) = [pid for pid, said in processes_of(project.home).items() if what in said and "child" not in said]
        os.kill(pid, signal.SIGKILL)

    def wait_state(*wanted: str) -> None:
        deadline = time.monotonic() + 2 * START_S
        while project.states() != list(wanted):
            assert time.monotonic() < deadline, (project.states(), project.out.read_text())
            time.sleep(0.2)

    untrain("first")
    process = project.up()
    assert project.prefect(*words).returncode == 0
    project.wait_training()
    kill("prefect server start")
    wait_state("Completed")  # the heavy child ended as if nothing had been, and Prefect heard of it in the end
    assert "prefect ended and is started again" in project.out.read_text()
    assert len(list((project.home / "store" / "train").iterdir())) == 1 and project.run_status() == "completed"

    untrain("second")
    assert project.prefect(*words).returncode == 0
    project.wait_training()
    kill("prefect.engine")
    wait_state("Completed", "Crashed")
    again = project.prefect(*words, "--watch")
    assert again.returncode == 0, again.stdout
    steps = json.loads((project.home / "runs" / "latest" / "steps.json").read_text())["steps"]
    assert {one["status"] for one in steps} == {"hit", "made"}
    process.terminate()
    assert process.wait(60) == 0
    wait_gone(project.home)


@pytest.mark.slow
def test_two_flows_of_one_recipe_at_the_same_time_make_each_step_once(world: World):
    world.drop("train")
    before = fingerprints(world.home)
    runs = [start(world, *FAST) for _ in range(2)]
    said = [run.communicate(timeout=600)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    records = [json.loads(path.read_text()) for path in run_files(world.home, "steps.json")]
    made = Counter(
        one["key"] for raw in records for one in raw["steps"] if one["status"] == "made" and raw["only"] == []
    )
    commits = Counter(asked(path) for path in (world.home / "store").glob("*/*/manifest.json"))
    assert set(commits.values()) == {1} and made["train/small"] == 2  # the fixture's run, and one of these
    (path,) = (world.home / "store" / "train").glob("*/manifest.json")
    assert json.loads(path.read_text())["attempts"] == 1
    after = fingerprints(world.home)
    assert {name: after.get(name) for name in before} == before
    assert not list((world.home / "partial").glob("*/*"))


@contextlib.contextmanager
def mounted(*words: str, place: Path) -> Iterator[None]:
    """A mount while the body runs; skips, with the command, where this user may not."""
    command = ["mount", *words, str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"needs root: {' '.join(command)}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.system
def test_a_full_disk_is_said_and_costs_nothing_that_had_finished(world: World, tmp_path: Path):
    world.drop("quantize", "rtn")
    used = sum(path.stat().st_size for path in world.home.rglob("*") if path.is_file() and not path.is_symlink())
    place = tmp_path / "disk"
    place.mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={used + 200 * MIB}", "none", place=place):
        full = replace(world, home=place / "home")
        shutil.copytree(world.home, full.home, symlinks=True)
        before = fingerprints(full.home)
        run = start(full, *FAST)
        os.kill(child := wait_child(full, "quantize", run), signal.SIGSTOP)
        filler = place / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(MIB))
                file.flush()
        with contextlib.suppress(OSError), filler.open("ab") as file:
            file.write(bytes(shutil.disk_usage(place).free))
        assert shutil.disk_usage(place).free < LEAST_BYTES
        os.kill(child, signal.SIGCONT)
        out, _ = run.communicate(timeout=1200)
        assert run.returncode == 1 and "the disk is full" in out and "running the same command again resumes" in out, (
            out
        )
        assert "Traceback" not in out, out
        assert fingerprints(full.home) == before
        filler.unlink()
        full.quench("run", str(full.recipe), *FAST)
        assert full.steps()["quantize/rtn-w4-g128"]["status"] == "made"
        after = fingerprints(full.home)
        assert {name: after.get(name) for name in before} == before
        assert full.quench("store", "verify").returncode == 0


@pytest.mark.system
@pytest.mark.parametrize("command", ["run", "up"])
def test_a_home_on_a_read_only_mount_is_refused_at_once(world: World, command: str):
    words = ("run", str(world.recipe)) if command == "run" else ("up",)
    with mounted("--bind", str(world.home), place=world.home):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(world.home)], check=True)
        refused = world.quench(*words, check=2).stderr
        assert "QUENCH_HOME cannot be written" in refused and "Read-only file system" in refused
        assert str(world.home) in refused and "set QUENCH_HOME" in refused
        assert world.quench("store", "ls").returncode == 0  # reading goes on
