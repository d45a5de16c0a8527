"""Arms that differ in their KV cache alone, the base in NF4, arms that cannot be: their cells and where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.commands.export import export
from flows.compose import compose
from flows.pins import pin
from flows.report.build import evaluate, render
from flows.results.read import read_run
from flows.run.folder import RunRecord
from recipes.arms import KV_CACHES
from recipes.checks.serving import warnings
from recipes.problem import RecipeError
from recipes.read.load import Loaded, load
from tasks.runtime.step import Step
from tests.conftest import World
from tests.flows.synthetic_run import SHAPES, Shape, SyntheticRun
from tests.recipes.folders import write_like_quickstart

OF = "gptq-w4-g128"
REASON = "PEFT puts no DoRA on awq layers: AwqLoraLinear does not support DoRA yet"
FILES = ("quantized", 5.6e-4, 7.2e-4, 0.895, 4_716_000, "dequantized", OF)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """QUENCH_HOME of a run with three KV arms and one that cannot be."""
    home = tmp_path_factory.mktemp("home")
    shapes = {
        **SHAPES,
        "base-nf4": Shape("nf4", 6.9, 6.55, 0.002, None),
        "awq-w4-g128.on-base": Shape("quantized", 1, 1, 1, None, None, "awq-w4-g128", True, unavailable=REASON),
        **{f"{OF}.kv-{kv}": Shape(*FILES, kv=kv) for kv in KV_CACHES},
    }
    SyntheticRun(home, test=120, general=40, shapes=shapes).write()
    return home


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    return next((home / "runs").iterdir())


@pytest.fixture(scope="module")
def report(home: Path, folder: Path) -> dict[str, Any]:
    return evaluate(read_run(folder, home))


def test_a_simulated_cache_has_quality_and_no_speed(report: dict[str, Any]) -> None:
    plain = report["arms"][OF]["metrics"]
    for kv in KV_CACHES:
        arm = report["arms"][f"{OF}.kv-{kv}"]
        assert arm["kv_cache"] == {"kind": kv, "of": OF, "label": "simulated: storage only"}
        assert (arm["status"], arm["ranked"], arm["path"]) == ("ok", True, report["arms"][OF]["path"])
        for name in ("size_bytes", "resident_bytes"):
            assert arm["metrics"][name] == plain[name]
        for name in ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s"):
            assert arm["metrics"][name]["value"] is None
            assert arm["metrics"][name]["reason"] == "simulated: storage only"
        for name in ("task", "ppl_test", "ppl_all", "bits_per_byte", "kl_mean"):
            assert arm["metrics"][name]["value"] is not None and arm["metrics"][name]["ci95"]
        assert f"{OF}.kv-{kv}" not in report["speed"]


def test_families_about_weights_know_no_kv_cache(report: dict[str, Any]) -> None:
    weights = ("merge", "quantization", "schemes", "merge-first", "calibration")
    made = [one for one in report["comparisons"] if one["family"] in weights]
    assert made and not any(".kv-" in one[side] for one in made for side in ("a", "b"))
    assert not any(".kv-" in answer["short"] for answer in report["answers"])


def test_an_arm_that_cannot_be_says_why_and_fails_nothing(report: dict[str, Any]) -> None:
    arm = report["arms"]["awq-w4-g128.on-base"]
    assert (arm["status"], arm["ranked"], arm["path"], arm["adapter_path"]) == ("unavailable", False, None, None)
    assert {(cell["value"], cell["reason"]) for cell in arm["metrics"].values()} == {(None, REASON)}
    assert report["not_ranked"] == {"awq-w4-g128.on-base": REASON} and report["failures"] == []
    left_out = {one["family"] for one in report["comparisons_left_out"]}
    assert left_out == {"merge-first"}


def test_the_base_in_nf4_is_no_adapter(report: dict[str, Any]) -> None:
    base, trained = (report["arms"][slug]["metrics"]["size_bytes"]["value"] for slug in ("base-nf4", "nf4-adapter"))
    assert report["arms"]["base-nf4"]["adapter_path"] is None
    assert trained - base == 3_744_000 + 900  # the adapter of this run; the tokenizer counts once


def test_the_report_is_written_and_says_storage_only(home: Path, folder: Path) -> None:
    text = render(folder, home).markdown
    assert f"KV cache simulated, storage only: {OF}.kv-fp8, {OF}.kv-fp8-calibrated, {OF}.kv-int8." in text
    assert f"Not ranked: awq-w4-g128.on-base: {REASON}." in text


def test_neither_is_exported(home: Path, folder: Path, tmp_path: Path) -> None:
    for slug, why in ((f"{OF}.kv-int8", f"Export {OF}"), ("awq-w4-g128.on-base", REASON)):
        with pytest.raises(RecipeError, match=why):
            export(folder, slug, tmp_path / "out", home=home)


# ---- the pipeline

RECIPE = """
name: like-quickstart
model: {base: base}
data: {path: rows.jsonl, max_length: 256}
train: {dora: true}
quantize: {schemes: [gptq-w4-g128]}
evaluate: {on_base: [nf4, gptq-w4-g128], kv_cache: [gptq-w4-g128, nf4-adapter, gptq-w4-g128.on-base]}
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(write_like_quickstart(tmp_path_factory.mktemp("recipe"), RECIPE))


def test_a_kv_cache_shares_the_model_and_only_calibrated_scales_read_the_set(loaded: Loaded, tmp_path: Path) -> None:
    steps: dict[str, Step] = {}
    matrix = compose(loaded.recipe, pin(loaded, tmp_path), lambda step: steps.__setitem__(step.key, step))
    for of in ("gptq-w4-g128", "nf4-adapter"):
        plain = steps[f"evaluate/{of}"]
        for kv in KV_CACHES:
            made = steps[f"evaluate/{of}.kv-{kv}"]
            read = dict(made.inputs)
            assert (read.pop("calibset", None) is steps["calibrate/like-quickstart"]) == (kv == "fp8-calibrated")
            assert read == plain.inputs
            own = {"kv": kv, "decoded": ["test"]}  # nothing chooses among KV arms by dev
            assert made.params == plain.params | own and plain.params["kv"] is None
            assert f"quantize/{of}.kv-{kv}" not in steps and f"measure/{of}.kv-{kv}" not in steps
    assert "adapter" not in steps["evaluate/base-nf4"].inputs
    gone = [one for one in matrix.arms if one.arm.unavailable and one.arm.null is None]
    assert [one.arm.slug for one in gone] == [
        "gptq-w4-g128.on-base",
        *(f"gptq-w4-g128.on-base.kv-{kv}" for kv in KV_CACHES),
    ]
    assert all((one.model, one.adapter, one.evaluate, one.measure) == (None,) * 4 for one in gone)
    assert not any("gptq-w4-g128.on-base" in key for key in steps) and "evaluate/nf4.on-base" in steps


def test_steps_json_says_what_an_arm_is(loaded: Loaded, tmp_path: Path) -> None:
    record = RunRecord(tmp_path, loaded, id="kv")
    record.composed(compose(loaded.recipe, pin(loaded, tmp_path), lambda step: None))
    arms = {arm.slug: arm for arm in read_run(record.folder, tmp_path).arms}
    kv = arms["gptq-w4-g128.kv-fp8"]
    assert (kv.kv, kv.of, kv.model, kv.measure) == ("fp8", "gptq-w4-g128", "quantize/gptq-w4-g128", None)
    assert not kv.is_control and not kv.external and kv.unavailable is None
    assert arms["gptq-w4-g128.on-base"].evaluate is None
    assert "does not support DoRA yet" in (arms["gptq-w4-g128.on-base"].unavailable or "")


def test_check_warns_of_what_peft_refuses(loaded: Loaded) -> None:
    (warned,) = warnings(loaded)
    assert warned.where.endswith("evaluate.on_base.1") and "GPTQLoraLinear" in warned.why
    assert warnings(load(loaded.path, sets=["train.dora=false"])) == []


@pytest.mark.slow
def test_caches_are_added_to_what_is_there(world: World) -> None:
    """A whole run: DoRA would train again, so the arm that cannot be is looked at above."""
    before = world.steps()
    world.quench("run", str(world.recipe), "--set", "evaluate.kv_cache=[rtn-w4-g128]")
    steps = world.steps()
    made = {key for key, step in steps.items() if step["status"] == "made"}
    assert made == {f"evaluate/rtn-w4-g128.kv-{kv}" for kv in KV_CACHES} and set(steps) - made == set(before)
    arms = world.report()["arms"]
    for kv in KV_CACHES:
        arm: Any = arms[f"rtn-w4-g128.kv-{kv}"]
        assert arm["metrics"]["kl_mean"]["value"] != arms["rtn-w4-g128"]["metrics"]["kl_mean"]["value"]  # type: ignore[index]
        manifest = json.loads(
            (world.home / str(steps[f"evaluate/rtn-w4-g128.kv-{kv}"]["path"]) / "manifest.json").read_text()
        )
        assert manifest["result"]["kv_cache"]["label"] == "storage only"
    scales = (
        next((world.home / "store" / "evaluate").glob("rtn-w4-g128.kv-fp8-calibrated-*")) / "files" / "kv_cache.json"
    )
    assert len(json.loads(scales.read_text())["scales"]) == len(json.loads(scales.read_text())["layers"]) > 1
