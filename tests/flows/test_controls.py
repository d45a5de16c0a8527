"""A run with control arms: nothing before calibration is made again, all sets have one shape, the report answers."""

import json

import pyarrow.parquet as pq
import pytest

from tests.conftest import QUICKSTART, World

SETS = (
    "--set",
    "calibrate.controls=[gptq-w4-g128]",
    "--set",
    f"calibrate.general={QUICKSTART / 'data' / 'general_calibration.jsonl'}",
)
CONTROLS = {f"gptq-w4-g128.calib-{kind}" for kind in ("generic", "mixed", "random")}


@pytest.mark.slow
def test_controls_are_added_to_what_is_there(world: World):
    before = world.steps()
    world.quench("run", str(world.recipe), *SETS)
    steps = world.steps()
    assert {key for key, step in steps.items() if step["status"] == "made"} == {
        *(f"calibrate/small-{kind}" for kind in ("generic", "mixed", "random")),
        *(f"{stage}/{slug}" for stage in ("quantize", "evaluate", "measure") for slug in CONTROLS),
    }
    assert {key: step["fingerprint"] for key, step in steps.items() if key in before} == {
        key: step["fingerprint"] for key, step in before.items()
    }
    shapes = set()
    for key, step in steps.items():
        if key.startswith("calibrate/"):
            sequences = pq.read_table(world.home / str(step["path"]) / "files" / "calibset.parquet")["input_ids"]
            shapes.add(tuple(map(len, sequences.to_pylist())))
    assert len(shapes) == 1
    report = world.report()
    assert set(report["arms"]) > CONTROLS
    made = [one for one in report["comparisons"] if one["family"] == "calibration"]
    assert {one["b"] for one in made} == {*CONTROLS, "rtn-w4-g128"}
    assert all(len(one["ci95_adjusted"]) == 2 for one in made)
    answer = report["answers"][-1]
    assert answer["question"] == "Did the calibration data matter here?"
    assert all(name in answer["short"] for name in ("general text", "half general text", "random tokens"))
    manifest = json.loads((world.home / str(steps["calibrate/small"]["path"]) / "manifest.json").read_text())
    assert manifest["result"]["near_twins"] == 0  # the default lets no twin of 128 rows but one pass
