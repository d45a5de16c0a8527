"""The main job end to end, by the command that people type."""

import json
import math
import shutil
from pathlib import Path

import pytest

from tasks.runtime.fingerprint import fingerprint
from tasks.runtime.store.local import write_json
from tests.conftest import World

NULL = "merged-dequantized.null-batch"
ARMS = [
    "base",
    "base-nf4",
    "nf4-adapter",
    "merged-dequantized",
    "merged-original",
    "gptq-w4-g128",
    "rtn-w4-g128",
    NULL,
]
METRICS = [
    "ppl_test",
    "ppl_all",
    "bits_per_byte",
    "ppl_general",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "task",
    "truncated",
    "size_bytes",
    "resident_bytes",
    "load_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
]


def fingerprints(home: Path) -> dict[str, tuple[int, str]]:
    """Every file of the store with its time of change and its bytes' digest."""
    import hashlib

    return {
        str(path.relative_to(home)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((home / "store").rglob("*"))
        if path.is_file()
    }


def test_report_has_every_arm_with_value_interval_and_n(small: World):
    report = small.report()
    assert list(report["arms"]) == ARMS
    checked = 0
    for slug, arm in report["arms"].items():
        assert arm["status"] == "ok" and sorted(arm["metrics"]) == sorted(METRICS), slug
        for name, metric in arm["metrics"].items():
            assert set(metric) == {"value", "ci95", "n", "split", "reason"}
            if slug == NULL and name in METRICS[-3:]:
                assert metric["value"] is None and "whose speed was measured" in metric["reason"]
                checked += 1
                continue
            assert metric["value"] is not None and math.isfinite(metric["value"]), (slug, name, metric["reason"])
            if name == "size_bytes" or (slug == "nf4-adapter" and name in ("kl_mean", "kl_p99", "top1_agreement")):
                assert metric["ci95"] is None
            else:
                low, high = metric["ci95"]
                assert low <= metric["value"] <= high, (slug, name)
            checked += 1
    assert checked == len(ARMS) * len(METRICS)


def test_paths_of_the_report_load_where_they_say(small: World):
    for slug, arm in small.report()["arms"].items():
        if arm["path"] is not None:
            assert (small.home / arm["path"] / "config.json").is_file(), slug
        assert (arm["path"] is None) == (slug in ("base", "base-nf4", "nf4-adapter"))
        assert (arm["adapter_path"] is not None) == (slug == "nf4-adapter")


def test_the_reference_agrees_with_itself(small: World):
    own = small.report()["arms"]["nf4-adapter"]["metrics"]
    assert own["kl_mean"]["value"] == 0 and own["top1_agreement"]["value"] == 1


def test_a_change_of_the_batch_size_is_measured(small: World):
    null = small.report()["nulls"]["arms"][NULL]
    assert null["changed"] == "batch size 25 instead of 50" and null["reason"] is None
    assert {"task", "ppl_test", "kl_mean", "ppl_general"} <= set(null["differences"])
    assert any(line["difference"] for line in null["differences"].values())  # another order of sums
    assert abs(null["differences"]["kl_mean"]["difference"]) < 1e-3
    assert null["answers"]["n"] == null["differences"]["task"]["n"]
    assert all("noise" in line for line in small.report()["comparisons"])


def test_run_folder_is_complete(small: World):
    there = {path.name for path in (small.home / "runs" / "latest").iterdir()}
    assert there >= {
        "recipe.yaml",
        "recipe.resolved.json",
        "plan.txt",
        "preflight.json",
        "registered.json",
        "steps.json",
        "report.json",
        "report.md",
        "report.html",
    }
    raw = json.loads((small.home / "runs" / "latest" / "steps.json").read_text())
    assert raw["status"] == "completed" and all(one["status"] == "made" for one in raw["steps"])


def test_what_test_can_tell_was_registered_before_the_first_step(small: World):
    folder = small.home / "runs" / "latest"
    told, report = json.loads((folder / "registered.json").read_text()), small.report()
    assert told["rows"] == report["data"]["test"]["rows"] and told["groups"] == report["data"]["test"]["groups"]
    assert (folder / "registered.json").stat().st_mtime_ns < (folder / "steps.json").stat().st_mtime_ns
    assert told["guess"] and told["kept_from"] is None and told["scored_before"] == []
    assert report["registered"]["smallest_loss"] == told["smallest_loss"]
    assert told["text"][0] in small.quench("plan", str(small.recipe)).stdout


def test_second_run_is_all_hits_and_touches_nothing(world: World):
    first = json.loads((world.home / "runs" / "latest" / "registered.json").read_text())
    before = fingerprints(world.home)
    planned = world.plan()
    assert planned and all(planned.values())
    world.quench("run", str(world.recipe))
    assert {one["status"] for one in world.steps().values()} == {"hit"}
    assert fingerprints(world.home) == before
    again = json.loads((world.home / "runs" / "latest" / "registered.json").read_text())
    assert again["kept_from"] and again == first | {"kept_from": again["kept_from"]}


def test_another_group_size_makes_that_scheme_only(world: World):
    change = "quantize.schemes.1=rtn-w4-g64"
    planned = world.plan("--set", change)
    wanted = {key for key, hit in planned.items() if not hit}
    assert wanted == {"quantize/rtn-w4-g64", "evaluate/rtn-w4-g64", "measure/rtn-w4-g64"}
    world.quench("run", str(world.recipe), "--set", change)
    assert {key for key, one in world.steps().items() if one["status"] == "made"} == wanted


def test_plan_names_the_field_that_differs(world: World):
    said = world.quench("plan", str(world.recipe), "--set", "train.rank=4").stdout
    assert "params.rank: 8 -> 4" in said
    assert "make  merge/small-dequantized" in said and "after train/small" in said


def test_a_failed_arm_fails_its_own_cells_only(world: World):
    # The scorer's databases do not know this schema: the row's score is an error of the stage, not of the run.
    folder = world.home.parent / "other"
    shutil.copytree(world.recipe.parent, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("gptq-w4-g128, rtn-w4-g128", "rtn-w4-g128"))
    done = world.quench(
        "run", str(recipe), "--set", "quantize.schemes=[rtn-w4-g32]", "--set", "run.time_limit_s=1", check=1
    )
    report = world.report()
    assert report["arms"]["rtn-w4-g32"]["status"] == "failed"
    cell = report["arms"]["rtn-w4-g32"]["metrics"]["task"]
    assert cell["value"] is None and "time_limit_s" in cell["reason"]
    assert report["arms"]["base"]["status"] == "ok" and report["arms"]["base"]["ranked"]
    assert not report["arms"]["rtn-w4-g32"]["ranked"]
    assert "quantize/rtn-w4-g32" in done.stderr


@pytest.mark.slow
def test_a_remade_adapter_with_other_bytes_makes_everything_below_again(world: World):
    before = adapter_digest(world.home)
    world.drop("train")
    planned = world.plan()
    above = {"prepare/small", "rehearse/small", "calibrate/small", "measure/base", "measure/base-nf4"}
    assert {key for key, hit in planned.items() if hit} == above
    # Four forward passes a step in place of one: execution, not identity, and another order of summation.
    world.quench("run", str(world.recipe), "--set", "measure.enabled=false", "--set", "run.micro_batch=4")
    assert adapter_digest(world.home) != before
    below = {key: one["status"] for key, one in world.steps().items() if key not in above}
    assert set(below.values()) == {"made"}, below


@pytest.mark.slow
def test_a_remade_adapter_with_the_same_bytes_keeps_everything_below(world: World):
    before = adapter_digest(world.home)
    world.drop("train")
    world.quench("run", str(world.recipe), "--set", "measure.enabled=false")
    if adapter_digest(world.home) != before:
        pytest.skip("training gave other bytes on this machine")
    made = {key for key, one in world.steps().items() if one["status"] == "made"}
    assert made == {"train/small"}


def adapter_digest(home: Path) -> str:
    """Digest of the one adapter in a home."""
    (path,) = (home / "store" / "train").glob("*/manifest.json")
    return json.loads(path.read_text())["digest"]


def test_an_artifact_of_an_older_version_of_its_step_is_a_miss(world: World):
    (path,) = (world.home / "store" / "quantize").glob("rtn-*/manifest.json")
    manifest = json.loads(path.read_text())
    version = manifest["identity"]["version"]
    manifest["identity"]["version"] = version - 1
    manifest["fingerprint"] = fingerprint(manifest["identity"])
    write_json(path, manifest)  # in the place of a hard link
    path.parent.rename(path.parent.with_name(f"rtn-w4-g128-{manifest['fingerprint'][:12]}"))
    said = world.quench("plan", str(world.recipe)).stdout
    assert f"version: {version - 1} -> {version}" in said
    assert "make  quantize/rtn-w4-g128" in said and "hit   quantize/gptq-w4-g128" in said
    (folder,) = (world.home / "store" / "quantize").glob("rtn-*")
    assert folder.name.endswith(manifest["fingerprint"][:12])  # it stays where it is
