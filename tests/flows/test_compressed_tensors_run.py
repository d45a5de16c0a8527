"""A scheme of another environment in a whole run: made there, loaded, ranked and measured here beside the others."""

import json

import pytest

from tasks.runtime.process.environments import environment_problem, lock_digest, locked_versions
from tests.conftest import World

NAME = "llmcompressor"
problem = environment_problem(NAME)


@pytest.mark.slow
@pytest.mark.skipif(problem is not None, reason=str(problem and problem.next))
def test_it_is_ranked_with_the_others(world: World):
    slugs = ["ct-gptq-w4-g128", "gptq-w4-g128"]
    change = ("--set", f"quantize.schemes=[{', '.join(slugs)}]", "--set", "evaluate.on_base=[ct-gptq-w4-g128]")
    wanted = {
        f"{stage}/{slug}" for stage in ("quantize", "evaluate", "measure") for slug in (slugs[0], f"{slugs[0]}.on-base")
    }
    assert {key for key, hit in world.plan(*change).items() if not hit} == wanted
    world.quench("run", str(world.recipe), *change)
    assert {key for key, one in world.steps().items() if one["status"] == "made"} == wanted
    arms = world.report()["arms"]
    kl = {slug: arms[slug]["metrics"]["kl_mean"]["value"] for slug in (*slugs, "merged-dequantized")}
    # Both are GPTQ on one grid; orders of columns and scales differ. They cost more than merging and less than twice
    # what the other does.
    assert kl["merged-dequantized"] < min(kl[slug] for slug in slugs)
    assert 0.5 < kl[slugs[0]] / kl[slugs[1]] < 2
    assert all(arms[slug]["status"] == "ok" for slug in arms)
    path = str(world.steps()["quantize/ct-gptq-w4-g128"]["path"])
    manifest = json.loads((world.home / path / "manifest.json").read_text())
    assert manifest["environment"]["lock"] == lock_digest(NAME)
    assert manifest["identity"]["tools"]["transformers"] == locked_versions(NAME)["transformers"]
    assert all(world.plan(*change).values())
