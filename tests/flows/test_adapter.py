"""train.adapter from plan to report: nothing is trained, everything below works unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.compose import compose
from flows.pins import pin
from flows.plan.memory import predict
from recipes.models.headers import read_headers
from recipes.read.load import load
from tasks.runtime.step import Step
from tests.conftest import World
from tests.recipes.checks.test_adapter import write_adapter
from tests.recipes.folders import write_project


def composed(folder: Path, *sets: str) -> dict[str, Step]:
    loaded = load(folder / "recipe.yaml", sets=sets)
    return {step.key: step for step in compose(loaded.recipe, pin(loaded, folder / "home"), lambda step: None).steps}


def test_the_adapter_is_an_input_of_the_train_step(tmp_path: Path):
    write_project(tmp_path)
    adapter = write_adapter(tmp_path / "adapter")
    trained, adopted = composed(tmp_path), composed(tmp_path, f"train.adapter={adapter}")
    assert list(trained) == list(adopted)  # the same pipeline
    assert trained["train/test"].inputs.keys() == {"dataset", "base"} and "adapter" not in trained["train/test"].params
    assert adopted["train/test"].inputs.keys() == {"dataset", "adapter"}
    same = {key for key in trained if trained[key].fingerprint == adopted[key].fingerprint}
    assert same == {"prepare/test", "rehearse/test", "calibrate/test", "measure/base", "measure/base-nf4"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    assert composed(tmp_path, f"train.adapter={adapter}")["train/test"].fingerprint != adopted["train/test"].fingerprint


def test_no_memory_is_asked_for_a_training(tmp_path: Path):
    write_project(tmp_path)
    sets = ("train.adapter=adapter",)
    headers = read_headers(tmp_path / "base")
    steps = {
        name: {
            one.key: one for one in predict(load(tmp_path / "recipe.yaml", sets=some).recipe, headers, device="cuda")
        }
        for name, some in (("trains", ()), ("adopts", sets))
    }
    assert steps["trains"]["train/test"].gpu_gib > 0
    assert steps["adopts"]["train/test"].gpu_gib == 0 and steps["adopts"]["train/test"].host_gib < 0.5


@pytest.mark.slow
def test_a_run_from_an_adapter_reports_both_merges(world: World, tmp_path: Path):
    (trained,) = (world.home / "store" / "train").iterdir()
    text = world.recipe.read_text().replace(" rows.jsonl", f" {world.recipe.parent / 'rows.jsonl'}")
    text = text.replace(" general.jsonl", f" {world.recipe.parent / 'general.jsonl'}")
    lines = [line for line in text.splitlines() if not line.startswith("train:")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join([*lines, f"train: {{adapter: {trained / 'files'}}}", "merge: {base: auto}"]))
    world.quench("run", str(recipe), "--set", "measure.enabled=false")
    steps, report = world.steps(), world.report()
    assert {key: one["status"] for key, one in steps.items()}["train/small"] == "made"
    assert report["adapter"] == {"trained_here": False, "provenance": "nf4"}  # its training record says so
    assert {arm["status"] for arm in report["arms"].values()} == {"ok"}
    assert report["sources"]["adapter"]["digest"]
    said = (world.home / "runs" / "latest" / "report.md").read_text()
    assert "chosen by this run" in said and "trained elsewhere; the weights under it there: nf4" in said
    # The same bytes were trained and adopted, so both runs merged the same model.
    merged = {
        path.name: json.loads((path / "manifest.json").read_text())["digest"]
        for path in (world.home / "store" / "merge").iterdir()
    }
    assert len(merged) == 4 and len(set(merged.values())) == 2
