"""An archived backend in a whole run: AutoGPTQ quantizes in its environment; the main one loads, ranks and measures."""

import json

import pytest

from tasks.runtime.process.environments import environment_problem, lock_digest, locked_versions
from tests.conftest import World

NAME = "autogptq"
SLUG, OURS = "gptq-w4-g128.auto-gptq", "gptq-w4-g128"
problem = environment_problem(NAME)


@pytest.mark.slow
@pytest.mark.skipif(problem is not None, reason=str(problem and problem.next))
def test_it_is_made_there_and_ranked_here(world: World):
    change = ("--set", f"quantize.schemes=[{OURS}, {{scheme: {OURS}, backend: auto-gptq}}]")
    wanted = {f"{stage}/{SLUG}" for stage in ("quantize", "evaluate", "measure")}
    assert {key for key, hit in world.plan(*change).items() if not hit} == wanted
    world.quench("run", str(world.recipe), *change)
    steps = world.steps()
    assert {key for key, one in steps.items() if one["status"] == "made"} == wanted
    report = world.report()
    arms = report["arms"]
    assert all(arms[slug]["status"] == "ok" for slug in (SLUG, OURS, "merged-dequantized"))
    kl = {slug: arms[slug]["metrics"]["kl_mean"]["value"] for slug in (SLUG, OURS, "merged-dequantized")}
    assert kl["merged-dequantized"] < min(kl[SLUG], kl[OURS]) and 0.5 < kl[SLUG] / kl[OURS] < 2
    manifest = json.loads((world.home / str(steps[f"quantize/{SLUG}"]["path"]) / "manifest.json").read_text())
    assert manifest["environment"]["lock"] == lock_digest(NAME)
    assert manifest["identity"]["tools"]["transformers"] == locked_versions(NAME)["transformers"]
    assert manifest["result"]["kernel"] is None  # its own environment loads it for nothing
    layers = report["layers"]
    assert layers[SLUG]["kernel"] == layers[OURS]["kernel"] == report["speed"][SLUG]["kernel"]
    assert [block["activation_max"] for block in layers[SLUG]["blocks"]] == [None] * len(layers[SLUG]["blocks"])
    assert all(block["activation_max"] > 0 for block in layers[OURS]["blocks"])
    assert all(world.plan(*change).values())
