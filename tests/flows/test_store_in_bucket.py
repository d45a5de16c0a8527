"""A recipe with its store in a bucket: what one home made is a hit in another, and weights pass no tracking server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest
from mlflow.tracking import MlflowClient

from flows.commands.store import collect
from flows.reach import unreached
from tasks.runtime.fingerprint import file_digest
from tasks.runtime.process.ports import free_port
from tasks.runtime.store.open import open_store
from tests.conftest import World
from tests.flows.commands.test_store import commit
from tests.mlflow_server import mlflow_server
from tests.postgres_server import postgres_server
from tests.s3_server import s3_server, wire


def contents(world: World) -> dict[str, str]:
    """sha256 of every file of the latest run's artifacts, by path in the store."""
    found: dict[str, str] = {}
    for step in world.steps().values():
        folder = world.home / str(step["path"])
        found |= {
            str(path.relative_to(world.home)): file_digest(path)
            for path in (folder / "files").rglob("*")
            if path.is_file()
        }
    return found


@pytest.mark.slow
def test_a_second_home_has_every_hit_and_the_same_report(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.env(url := server.bucket("store")).items():
            monkeypatch.setenv(name, value)
        said = world.quench("plan", str(world.recipe)).stdout
        steps = [line for line in said.splitlines() if line.startswith(("hit", "make"))]
        assert said.count("made here, not in the bucket yet") == len(steps) > 0 and all(world.plan().values())
        world.quench("run", str(world.recipe))  # uploads, and makes nothing
        assert {one["status"] for one in world.steps().values()} == {"hit"}
        second = replace(world, home=tmp_path / "second" / "home")
        second.home.mkdir(parents=True)
        assert all(second.plan().values())
        assert not list(second.home.glob("store/*/*"))  # a plan downloads nothing
        (folder := tmp_path / "mlflow").mkdir()
        with mlflow_server(folder) as mlflow, wire(mlflow) as line:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", line.endpoint)
            second.quench("run", str(world.recipe))
            runs = MlflowClient(mlflow)
            experiment = runs.get_experiment_by_name("small")
            assert experiment is not None
            (quantized,) = runs.search_runs([experiment.experiment_id], "tags.`quench.key` = 'quantize/gptq-w4-g128'")
            got = Path(runs.download_artifacts(quantized.info.run_id, "quantize/references.json"))
            named = json.loads(got.read_text())
        assert {one["status"] for one in second.steps().values()} == {"hit"}
        assert contents(second) == contents(world) and len(contents(second)) > 50
        for part in ("arms", "comparisons", "choice", "verdict"):
            assert second.report()[part] == world.report()[part], part
        weights = [path for path in second.home.glob("store/*/*/files/*.safetensors")]
        assert len(weights) >= 5
        assert not [path for _, path in line.seen if path.partition("?")[0].endswith(".safetensors")]
        assert line.sent < sum(path.stat().st_size for path in weights) / 4
        place, size = named["model.safetensors"]["uri"], named["model.safetensors"]["bytes"]
        name, _, key = place.removeprefix("s3://").partition("/")
        assert place.startswith(f"{url}/store/quantize/gptq-w4-g128-")
        assert server.client().head_object(Bucket=name, Key=key)["ContentLength"] == size > 1 << 20


@pytest.mark.system
def test_mlflow_on_postgresql_and_s3_has_the_run_and_no_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        s3_server(tmp_path / "s3") as server,
        postgres_server(tmp_path.parent / f"{tmp_path.name}-postgres") as database,
    ):
        for name, value in server.env(server.bucket("store")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", server.endpoint)
        server.client().create_bucket(Bucket="mlflow")
        (folder := tmp_path / "mlflow").mkdir()
        # As infra/compose.yaml starts it: files go from here to the bucket, and not through the server.
        direct = ("--no-serve-artifacts", "--default-artifact-root", "s3://mlflow/")
        with mlflow_server(folder, *direct, database=database) as mlflow, wire(mlflow) as line:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", line.endpoint)
            world.quench("run", str(world.recipe))
        sizes = {one["Key"]: one["Size"] for one in server.client().list_objects_v2(Bucket="mlflow")["Contents"]}
        assert any(key.endswith("report.html") for key in sizes)
        assert any(key.endswith("quantize/references.json") for key in sizes)
        assert not [key for key in sizes if key.endswith(".safetensors")]
        assert line.seen and not [path for _, path in line.seen if "mlflow-artifacts" in path]
        rows = psycopg2.connect(database)
        with rows.cursor() as cursor:
            cursor.execute("select count(*), count(*) filter (where status = 'FINISHED') from runs")
            everything, finished = cursor.fetchone() or (0, 0)
        rows.close()
    assert everything == finished > 10  # the run itself, what was trained, and each arm


def test_gc_says_what_the_bucket_keeps_and_what_it_took_is_a_hit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.env(url := server.bucket("store")).items():
            monkeypatch.setenv(name, value)
        made = commit(open_store(home), "train", "one", inputs={})
        assert [one.in_bucket for one in unreached(home)] == [True]
        text = str(collect(home, remove=True).text)
        assert "stays in the bucket" in text and not made.path.exists()
        store = open_store(home)
        found = store.find("train", made.fingerprint, {})
        assert found.why == "in the bucket" and store.bring(found) == made
        assert (made.path / "weights.txt").read_text() == "train/one" and server.keys(url, "manifests/")


def test_a_bucket_that_does_not_answer_is_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.plan.validate import validate
    from recipes.problem import RecipeError
    from tests.conftest import write_small_recipe

    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "QUENCH_STORE": "s3://store"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RecipeError, match="The bucket's server does not answer"):
        validate(write_small_recipe(tmp_path / "project"), sets=[], home=tmp_path / "home")
    assert not list((tmp_path / "home").glob("store/*"))
