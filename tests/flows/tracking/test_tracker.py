"""MLflow as a view of the store: same names on every arm, curves, links instead of copies."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import DatasetInput, Run
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from tests.conftest import World
from tests.flows.test_run import ARMS, METRICS


@pytest.fixture(scope="module")
def runs(small: World) -> dict[str, Run]:
    """All MLflow runs of the small run by name; the parent under `parent`."""
    client = MlflowClient(f"sqlite:///{small.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    names = {(run.info.run_name if "mlflow.parentRunId" in run.data.tags else "parent"): run for run in found}
    assert len(names) == len(found)
    return names


def test_a_run_a_stage_and_an_arm(runs: dict[str, Run]):
    stages = {
        "prepare/small",
        "train/small",
        "merge/small-dequantized",
        "merge/small-original",
        "reference/small",
        "calibrate/small",
        "quantize/gptq-w4-g128",
        "quantize/rtn-w4-g128",
    }
    assert set(runs) == {"parent", *stages, *ARMS}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in runs.items() if name != "parent"} == {
        runs["parent"].info.run_id
    }


def test_arms_have_the_same_metric_names_as_the_report(runs: dict[str, Run], small: World):
    report = small.report()
    for slug in ARMS:
        for name in METRICS:
            expected = report["arms"][slug]["metrics"][name]["value"]
            assert runs[slug].data.metrics.get(name) == (expected and pytest.approx(expected)), (slug, name)
    assert runs["parent"].data.metrics["task/base"] == pytest.approx(runs["base"].data.metrics["task"])


def test_the_loss_curve_is_there_once(runs: dict[str, Run], small: World):
    client = MlflowClient(f"sqlite:///{small.home / 'mlflow.db'}")
    curve = client.get_metric_history(runs["train/small"].info.run_id, "train/loss")
    assert [point.step for point in curve] == list(range(1, 9))


def test_files_are_links_into_the_store_and_not_copies(runs: dict[str, Run], small: World):
    wanted = {
        "train/small": ("train", "adapter_model.safetensors"),
        "calibrate/small": ("calibrate", "calibset.parquet"),
        "quantize/gptq-w4-g128": ("quantize", "model.safetensors"),
    }
    for name, (stage, file) in wanted.items():
        linked = Path(local_file_uri_to_path(runs[name].info.artifact_uri)) / stage / file
        (stored,) = (small.home / "store" / stage).glob(f"{name.split('/')[1]}-*/files/{file}")
        assert linked.samefile(stored), name


def test_the_calibration_set_is_a_dataset_of_every_run_that_reads_it(runs: dict[str, Run], small: World):
    (folder,) = (small.home / "store" / "calibrate").glob("small-*")
    digest = json.loads((folder / "manifest.json").read_text())["digest"]
    for name in ("parent", "calibrate/small", "quantize/gptq-w4-g128"):
        (logged,) = used(runs[name], "calibration")
        assert (logged.dataset.name, logged.dataset.digest) == (folder.name, digest[:36]), name
        assert {tag.key: tag.value for tag in logged.tags}["sha256"] == digest
        assert json.loads(logged.dataset.source)["uri"] == str(folder / "files" / "calibset.parquet")
    assert not runs["quantize/rtn-w4-g128"].inputs.dataset_inputs


def used(run: Run, context: str) -> list[DatasetInput]:
    """Data sets that a run used for something."""
    return [one for one in run.inputs.dataset_inputs if tag(one, "mlflow.data.context") == context]


def tag(logged: DatasetInput, key: str) -> str | None:
    return {one.key: one.value for one in logged.tags}.get(key)


def test_every_split_is_a_dataset_of_the_runs_that_read_it(runs: dict[str, Run], small: World):
    (folder,) = (small.home / "store" / "prepare").glob("small-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    words = {"train": "training", "dev": "validation", "test": "test"}
    for split, context in words.items():
        (logged,) = used(runs["parent"], context)
        assert (logged.dataset.name, tag(logged, "sha256")) == (f"small-{split}", manifest["digest"])
        assert json.loads(logged.dataset.profile)["num_rows"] == manifest["result"]["rows"][split]
        assert json.loads(logged.dataset.source)["uri"] == str(folder / "files" / "rows.parquet")
    assert {tag(one, "mlflow.data.context") for one in runs["train/small"].inputs.dataset_inputs} == {
        "training",
        "validation",
    }
    for slug in ARMS:
        assert [one.dataset.name for one in runs[slug].inputs.dataset_inputs] == ["small-test"]


def table(path: str) -> dict[str, list[Any]]:
    """Columns of a table as log_table writes it."""
    raw = json.loads(Path(path).read_text())
    return {name: [row[place] for row in raw["data"]] for place, name in enumerate(raw["columns"])}


def test_tables_and_figures_are_on_the_parent(runs: dict[str, Run], small: World):
    client = MlflowClient(f"sqlite:///{small.home / 'mlflow.db'}")
    report, parent = small.report(), runs["parent"].info.run_id
    arms = table(client.download_artifacts(parent, "tables/arms.json"))
    assert arms["arm"] == list(report["arms"])
    for slug, value, low in zip(arms["arm"], arms["kl_mean"], arms["kl_mean.low"], strict=True):
        cell = report["arms"][slug]["metrics"]["kl_mean"]
        assert value == pytest.approx(cell["value"], abs=1e-9)  # ten decimals are written
        assert low == pytest.approx(cell["ci95"][0], abs=1e-9) if cell["ci95"] else low is None
    made = table(client.download_artifacts(parent, "tables/comparisons.json"))
    assert made["verdict"] == [one["verdict"] for one in report["comparisons"]]
    figures = {one.path for one in client.list_artifacts(parent, "figures")}
    assert figures >= {"figures/kl-against-size.svg", "figures/layer-errors.svg"}
    drawn = Path(client.download_artifacts(parent, "figures/kl-against-size.svg")).read_text()
    assert "gptq-w4-g128" in drawn and "var(--" not in drawn


def test_the_report_is_on_the_parent(runs: dict[str, Run], small: World):
    client = MlflowClient(f"sqlite:///{small.home / 'mlflow.db'}")
    files = {one.path for one in client.list_artifacts(runs["parent"].info.run_id)}
    assert files >= {"report.html", "report.json", "report.md", "recipe.yaml", "steps.json"}
    assert runs["parent"].data.params["train.rank"] == "8"
