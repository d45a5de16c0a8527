"""MLflow again from the runs' records: as the run itself wrote it, and once."""

import fcntl
import json
from pathlib import Path

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from flows.run.folder import stop_dead
from tests.conftest import World


def sync(world: World) -> list[str]:
    """Ids of the runs that `quench track sync` writes. A process of its own: MLflow keeps its address in os.environ."""
    return json.loads(world.quench("track", "sync", "--json").stdout)["written"]


def runs(home: Path) -> dict[str, Run]:
    """All MLflow runs by name; the parent under `parent`."""
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, max_results=1000)
    names = {(run.info.run_name if "mlflow.parentRunId" in run.data.tags else "parent"): run for run in found}
    assert len(names) == len(found)
    return names


def sent(home: Path) -> dict[str, tuple[object, ...]]:
    """Everything of each run that does not depend on when it was sent."""
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    told = {}
    for name, run in runs(home).items():
        curve = client.get_metric_history(run.info.run_id, "train/loss")
        files = sorted(one.path for one in client.list_artifacts(run.info.run_id))
        told[name] = (run.info.status, run.data.metrics, run.data.params, files, [(p.step, p.value) for p in curve])
    return told


def test_a_lost_mlflow_is_written_again_and_twice_adds_nothing(world: World, small: World):
    assert not (world.home / "mlflow.db").exists()
    (run,) = [path for path in (world.home / "runs").iterdir() if not path.is_symlink()]
    assert sync(world) == [run.name]
    again = sent(world.home)
    assert again == sent(small.home)
    ids = {name: one.info.run_id for name, one in runs(world.home).items()}
    assert sync(world) == []
    assert sent(world.home) == again
    assert {name: one.info.run_id for name, one in runs(world.home).items()} == ids


def test_a_killed_run_is_closed_and_one_under_way_is_left_alone(world: World):
    (run,) = [path for path in (world.home / "runs").iterdir() if not path.is_symlink()]
    record = json.loads((run / "steps.json").read_text())
    (run / "steps.json").write_text(json.dumps({**record, "status": "running"}))
    with (run / ".alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        assert stop_dead(world.home) == [] and sync(world) == []
    assert stop_dead(world.home) == [run]
    assert json.loads((run / "steps.json").read_text())["status"] == "stopped"
    assert sync(world) == [run.name]
    assert runs(world.home)["parent"].info.status == "KILLED"
