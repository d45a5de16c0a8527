"""Null arms from recipe to steps: what is other about them is in their identity, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.compose import Matrix, compose
from flows.pins import pin
from flows.promotion.champion import _same_scoring
from flows.results.read import Run
from recipes.arms import FLOOR
from recipes.problem import RecipeError
from recipes.read.load import load
from tasks.runtime import gpus
from tasks.runtime.fingerprint import difference
from tasks.runtime.gpus import Gpu, device_kind
from tasks.runtime.step import Limits, Step, resources
from tasks.serve import _nothing_to_serve
from tests.recipes.folders import write_project

ALL = "evaluate.null_arms=[batch,threads,attention]"


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPU slots, and no card but those that a test plants: what is listed is the driver's, and no GPU is here."""
    monkeypatch.setenv("QUENCH_CPU_SLOTS", "2")
    monkeypatch.setattr(gpus, "all_gpus", tuple)


def composed(folder: Path, *sets: str, **options: Any) -> Matrix:
    loaded = load(folder / "recipe.yaml", sets=list(sets))
    return compose(loaded.recipe, pin(loaded, folder / "home"), lambda step: None, **options)


def scored(matrix: Matrix) -> dict[str, Step]:
    """Arm -> its evaluate step."""
    return {row.arm.slug: row.evaluate for row in matrix.arms if row.evaluate}


def test_one_thing_is_other_and_the_files_are_the_same(tmp_path: Path) -> None:
    write_project(tmp_path)
    matrix = composed(tmp_path, ALL)
    steps = scored(matrix)
    plain = steps[FLOOR]
    apart = {
        kind: difference(plain.identity["params"], steps[f"{FLOOR}.null-{kind}"].identity["params"])
        for kind in ("batch", "threads", "attention")
    }
    decoded = 'decoded: null -> ["test"]'  # nothing chooses by a null arm's answers to dev
    assert apart == {
        "batch": ["batch_size: 16 -> 8", decoded],
        "threads": [decoded, "threads: null -> 2"],
        "attention": ['attention: null -> "eager"', decoded],
    }
    for kind in apart:
        null = steps[f"{FLOOR}.null-{kind}"]
        assert (null.inputs, null.tools, null.version) == (plain.inputs, plain.tools, plain.version)
        (row,) = (row for row in matrix.arms if row.arm.slug == f"{FLOOR}.null-{kind}")
        assert (row.model, row.measure, row.serve) == (row.model, None, None)
        assert row.model is not None and row.model.key == "merge/test-dequantized"


def test_the_other_number_of_threads_is_leased(tmp_path: Path) -> None:
    write_project(tmp_path)
    steps = scored(composed(tmp_path, ALL))
    assert resources(steps[f"{FLOOR}.null-threads"], Limits(threads=1)).cpus == 2
    assert {resources(step, Limits(threads=1)).cpus for slug, step in steps.items() if "threads" not in slug} == {1}
    assert scored(composed(tmp_path, ALL, "run.threads=2"))[f"{FLOOR}.null-threads"].threads == 1


def test_a_selection_of_arms_has_the_null_arms_that_it_names(tmp_path: Path) -> None:
    write_project(tmp_path)
    slug = f"{FLOOR}.null-batch"
    assert [row.arm.slug for row in composed(tmp_path, ALL, only=[FLOOR]).arms] == [FLOOR]
    named = composed(tmp_path, ALL, only=[slug])
    keys = [step.key for step in named.steps]
    assert [row.arm.slug for row in named.arms] == [slug] and f"evaluate/{slug}" in keys
    assert f"evaluate/{FLOOR}" not in keys


def test_no_engine_serves_them(tmp_path: Path) -> None:
    write_project(tmp_path)
    rows = [row for row in composed(tmp_path, ALL, "serve.engine=vllm").arms if row.arm.null]
    assert len(rows) == 3 and not any(row.serve for row in rows) and all(row.unserved for row in rows)
    assert {_nothing_to_serve(row.arm) for row in rows} == {f"it has the files of {FLOOR}"}


def test_null_arms_change_no_other_step(tmp_path: Path) -> None:
    write_project(tmp_path)
    with_nulls, without = (composed(tmp_path, sets) for sets in (ALL, "evaluate.null_arms=[]"))
    prints = [{step.key: step.fingerprint for step in matrix.steps} for matrix in (with_nulls, without)]
    assert {key: mark for key, mark in prints[0].items() if ".null-" not in key} == prints[1]


# ---- the device


def gpu(name: str, index: int, capability: str | None) -> Gpu:
    return Gpu(index=index, uuid=f"GPU-{index}", name=name, total_bytes=None, free_bytes=None, capability=capability)


def test_the_device_is_in_the_identity_of_what_is_scored_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path)
    on_cpu = composed(tmp_path, "evaluate.null_arms=[]")
    monkeypatch.setattr(gpus, "all_gpus", lambda: (gpu("NVIDIA H200", 0, "9.0"),))
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    on_gpu = composed(tmp_path, "evaluate.null_arms=[]", "measure.enabled=false")
    devices = {step.stage: step.params.get("device") for step in on_gpu.steps}
    assert {stage for stage, device in devices.items() if device == "NVIDIA H200, compute 9.0"} == {
        "reference",
        "evaluate",
    }
    before = {step.key: step.fingerprint for step in on_cpu.steps}
    after = {step.key: step.fingerprint for step in on_gpu.steps}
    changed = {key.split("/")[0] for key in after if after[key] != before[key]}
    assert changed == {"reference", "evaluate"}


def test_kinds_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    cards = (gpu("NVIDIA L4", 0, "8.9"), gpu("NVIDIA L4", 1, "8.9"), gpu("NVIDIA A100", 2, None))
    monkeypatch.setattr(gpus, "all_gpus", lambda: cards)
    assert device_kind("cpu") == "cpu"
    assert device_kind("cuda") == "NVIDIA A100 or NVIDIA L4, compute 8.9"
    assert device_kind("cuda", [1]) == device_kind("cuda", ["GPU-0"]) == "NVIDIA L4, compute 8.9"
    monkeypatch.setattr(gpus, "all_gpus", tuple)
    assert device_kind("cuda") == "cuda"  # nobody says which


def test_a_run_that_was_scored_on_another_device_is_not_joined_by_its_champion(tmp_path: Path) -> None:
    write_project(tmp_path)
    ours = scored(composed(tmp_path))[FLOOR].identity
    run = Run(folder=tmp_path, home=tmp_path, raw={}, recipe={}, predicted={}, steps={}, arms=())
    _same_scoring(ours, ours, run)
    theirs = {**ours, "params": {**ours["params"], "device": "NVIDIA L4, compute 8.9"}}
    with pytest.raises(RecipeError) as caught:
        _same_scoring(ours, theirs, run)
    assert "scored on NVIDIA L4, compute 8.9" in caught.value.problems[0].what
