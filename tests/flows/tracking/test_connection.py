"""What MLflow does to a run's record when people delete, move, or write much: real SQLite stores, runs by hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from mlflow.entities import Dataset, DatasetInput, Run, ViewType
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from flows.promotion import registry
from flows.promotion.journal import Promotion, now
from flows.service.postgres import stores
from flows.tracking.moved import follow
from flows.tracking.sync import sync
from flows.tracking.tracker import Tracker
from recipes.problem import RecipeError
from tasks.runtime.store.local import read_json
from tests.flows.tracking.tracked import ADAPTER, write_run
from tests.postgres_server import postgres_server

TRACKING = "MLFLOW_TRACKING_URI"


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow keeps the address of a test in os.environ."""
    monkeypatch.setenv(TRACKING, "")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make."""
    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def home(empty: Path, tmp_path: Path) -> Path:
    home = tmp_path / "old" / "Öfen & 窯"
    home.mkdir(parents=True)
    shutil.copy(empty, home / "mlflow.db")
    return home


def client(home: Path) -> MlflowClient:
    os.environ[TRACKING] = ""
    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def sent(home: Path) -> dict[str, Run]:
    """Active MLflow runs by name."""
    mlflow = client(home)
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    runs = mlflow.search_runs(experiments, max_results=1000)
    names = {run.info.run_name: run for run in runs}
    assert len(names) == len(runs)
    return names


def synced(home: Path) -> tuple[list[str], list[str]]:
    """Runs that `quench track sync` writes, and what it says."""
    said: list[str] = []
    os.environ[TRACKING] = ""
    return sync(home, said.append), said


def local(uri: str | None) -> Path:
    """Where a place of MLflow is on this machine."""
    return Path(local_file_uri_to_path(uri))


def promotion(home: Path, run: Path) -> Promotion:
    """The adapter of a run as version 1, without a gate: what the registry is made of."""
    (trained,) = [step for step in read_json(run / "steps.json")["steps"] if step["stage"] == "train"]
    digest = read_json(home / trained["path"] / "manifest.json")["digest"]
    return Promotion(
        at=now(),
        model="quickstart",
        version=1,
        event="promoted",
        outcome="pass",
        run=run.name,
        arm="nf4-adapter",
        kind="nf4",
        path=trained["path"],
        digest=digest,
        recipe="0" * 64,
        dataset=None,
        champion=None,
    )


def test_a_deleted_experiment_is_restored_with_its_runs_and_no_run_twice(home: Path):
    run = write_run(home)
    assert synced(home)[0] == [run.name]
    before = sent(home)
    mlflow = client(home)
    # Written anew once: what was deleted then does not come back with the experiment.
    mlflow.delete_tag(before[run.name].info.run_id, "quench.whole")
    assert synced(home)[0] == [run.name]
    again = sent(home)
    assert again.keys() == before.keys() and again[run.name].info.run_id != before[run.name].info.run_id
    experiment = mlflow.get_experiment_by_name("quickstart").experiment_id
    mlflow.delete_experiment(experiment)
    second = write_run(home, run="20261201-120000-quickstart-cd34")
    assert synced(home) == (
        [second.name],
        [
            "the MLflow experiment quickstart was deleted: it is restored, with its runs",
            f"written    {second.name}",
        ],
    )
    parents = mlflow.search_runs([experiment], "tags.`quench.kind` = 'run'", ViewType.ACTIVE_ONLY)
    assert {parent.info.run_name for parent in parents} == {run.name, second.name} and len(parents) == 2
    assert {parent.info.status for parent in parents} == {"KILLED"}
    nested = mlflow.search_runs([experiment], f"tags.`quench.run` = '{run.name}'")
    assert {entry.info.run_id for entry in nested} == {entry.info.run_id for entry in again.values()}


def test_more_names_than_one_batch_takes_and_names_that_would_be_one(home: Path):
    domains = {f"domain {number}": number for number in range(250)}
    recipe = {"data": {"stratify": {**domains, "a?b": 1, "a*b": 2}, "long": "x" * 6001, "lines": "\0"}}
    run = write_run(home, recipe=recipe)
    assert synced(home)[0] == [run.name]
    params = sent(home)[run.name].data.params
    assert {params[f"data.stratify.{name}"] for name in domains} == {str(number) for number in domains.values()}
    assert sorted(text for name, text in params.items() if name.startswith("data.stratify.a_b")) == ["1", "2"]
    assert params["data.long"] == "x" * 5999 + "\u2026" and params["data.lines"] == "\\0"
    assert params["model.base"] == "base"

    tracker = Tracker(home, experiment="quickstart", run="many")
    tracker.start({}, tags={"long": "y" * 9000})
    numbers = {"part": {f"layer {number}?": float(number) for number in range(1500)} | {"layer 1*": -1.0}}
    tracker.thread.submit(lambda: tracker._numbers(tracker.parent, numbers)).result()
    tracker.end("completed")
    assert tracker.trouble == []
    parent = sent(home)["many"]
    assert len(parent.data.metrics) == 1501 and parent.data.tags["long"] == "y" * 7999 + "\u2026"
    assert set(parent.data.metrics.values()) == {-1.0, *map(float, range(1500))}


def test_a_home_that_was_renamed_has_its_links_and_its_registry_after_sync(home: Path, tmp_path: Path):
    old, new = home, tmp_path / "new" / "50% of it"
    run = write_run(old)
    assert synced(old)[0] == [run.name]
    line = promotion(old, run)
    os.environ[TRACKING] = ""
    assert registry.sync(old, "quickstart", [line]) == []
    ids = {name: entry.info.run_id for name, entry in sent(old).items()}
    mlflow = client(old)
    elsewhere = mlflow.create_experiment("own", artifact_location=(tmp_path / "mine" / "mlartifacts" / "x").as_uri())
    rows = Dataset(
        name="rows", digest="1", source_type="local", source=json.dumps({"uri": str(old / "store" / "rows.parquet")})
    )
    mlflow.log_inputs(ids["train/quickstart"], [DatasetInput(rows, [])])

    new.parent.mkdir()
    old.rename(new)
    written, said = synced(new)
    assert (written, said) == ([], [f"this home was at {old}: MLflow's paths are now those below {new}"])
    assert synced(new) == ([], [])
    mlflow = client(new)
    assert {name: entry.info.run_id for name, entry in sent(new).items()} == ids
    weights = mlflow.download_artifacts(ids["train/quickstart"], "train/adapter_model.safetensors")
    assert Path(weights).read_bytes() == ADAPTER
    linked = local(sent(new)["train/quickstart"].info.artifact_uri) / "train" / "adapter_model.safetensors"
    assert linked.samefile(new / line.path / "files" / "adapter_model.safetensors")
    version = mlflow.get_model_version_by_alias("quickstart", "champion")
    registered = mlflow.get_model_version_download_uri("quickstart", version.version)
    (model,) = mlflow.search_logged_models([mlflow.get_experiment_by_name("quickstart").experiment_id])
    assert registered == version.source == model.artifact_location
    assert (local(registered) / "adapter_model.safetensors").samefile(linked)
    (source,) = [entry.dataset.source for entry in sent(new)["train/quickstart"].inputs.dataset_inputs]
    assert json.loads(source)["uri"] == str(new / "store" / "rows.parquet")
    os.environ[TRACKING] = ""
    assert registry.sync(new, "quickstart", [line]) == []
    assert len(mlflow.search_model_versions("name='quickstart'")) == 1
    assert mlflow.get_experiment(elsewhere).artifact_location == (tmp_path / "mine" / "mlartifacts" / "x").as_uri()
    assert not old.exists()

    # A copy is a home of its own: it writes nothing into the one that it was copied from.
    copy = tmp_path / "copy"
    shutil.copytree(new, copy)
    second = write_run(copy, run="20261201-120000-quickstart-cd34")
    written, said = synced(copy)
    assert written == [second.name] and said[0].startswith(f"this home was at {new}")
    mlflow = client(copy)
    experiment = mlflow.get_experiment_by_name("quickstart").experiment_id
    uris = [entry.info.artifact_uri or "" for entry in mlflow.search_runs([experiment])]
    assert len(uris) == 2 * len(ids)
    assert all(uri.startswith(copy.as_uri()) for uri in uris)
    assert not list(new.rglob(f"*{second.name}*"))


def test_files_that_are_gone_are_sent_again_to_run_and_registry(home: Path):
    run = write_run(home)
    line = promotion(home, run)
    synced(home)
    os.environ[TRACKING] = ""
    registry.sync(home, "quickstart", [line])
    shutil.rmtree(home / "mlartifacts")
    assert synced(home)[0] == [run.name]
    os.environ[TRACKING] = ""
    assert registry.sync(home, "quickstart", [line]) == []
    (model,) = (home / "mlartifacts" / "quickstart" / "models").rglob("adapter_model.safetensors")
    assert model.read_bytes() == ADAPTER
    shutil.rmtree(home / "mlartifacts")
    shutil.rmtree(home / line.path)
    os.environ[TRACKING] = ""
    (trouble,) = registry.sync(home, "quickstart", [line])
    assert trouble.startswith("version 1 has lost its files, and the store has none")


def test_a_database_elsewhere_is_not_changed_and_the_run_is_refused_with_what_to_type(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    (home / "mlflow.db").rename(tmp_path / "shared.db")
    monkeypatch.setenv(TRACKING, uri)
    Tracker(home, experiment="quickstart", run="a-run").close()
    new = home.rename(tmp_path / "new")
    with pytest.raises(RecipeError) as raised:
        Tracker(new, experiment="quickstart", run="a-run")
    (problem,) = raised.value.problems
    mlflow = MlflowClient(uri)
    known = mlflow.get_experiment_by_name("quickstart")
    assert f"mlflow experiments rename --experiment-id {known.experiment_id} --new-name" in problem.next
    assert known.artifact_location == (home / "mlartifacts" / "quickstart").as_uri()
    mlflow.rename_experiment(known.experiment_id, "quickstart-old")
    Tracker(new, experiment="quickstart", run="a-run").close()
    place = mlflow.get_experiment_by_name("quickstart").artifact_location
    assert place == (new / "mlartifacts" / "quickstart").as_uri()


@pytest.mark.slow
@pytest.mark.system
def test_the_database_of_quench_up_on_postgresql_follows_its_home(tmp_path: Path):
    old, new = tmp_path / "old home", tmp_path / "new home"
    with postgres_server(tmp_path.parent / f"{tmp_path.name}-postgres") as url:
        database = stores(url).mlflow
        mlflow = MlflowClient(database)
        # As its server makes it: in the folder of its number. The other one is somebody else's choice.
        ours = mlflow.create_experiment("quickstart", artifact_location=(old / "mlartifacts" / "1").as_uri())
        assert ours == "1"
        elsewhere = (tmp_path / "mine" / "mlartifacts" / "own folder").as_uri()
        other = mlflow.create_experiment("other", artifact_location=elsewhere)
        run = mlflow.create_run(ours).info.run_id
        version = mlflow.create_registered_model("quickstart") and mlflow.create_model_version(
            "quickstart", (old / "mlartifacts" / "1" / "models" / "m-1").as_uri()
        )
        (said,) = follow(new, database)
        assert said == f"this home was at {old}: MLflow's paths are now those below {new}"
        assert follow(new, database) == []
        mlflow = MlflowClient(database)
        assert mlflow.get_run(run).info.artifact_uri == f"{new.as_uri()}/mlartifacts/1/{run}/artifacts"
        registered = mlflow.get_model_version_download_uri("quickstart", version.version)
        assert registered == f"{new.as_uri()}/mlartifacts/1/models/m-1"
        assert mlflow.get_experiment(other).artifact_location == elsewhere
