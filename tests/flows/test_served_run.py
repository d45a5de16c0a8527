"""A run whose arms are served by a real engine: everything else is a hit, and the report has its word."""

import json

import pytest

from tasks.runtime.process.environments import environment_problem, lock_digest
from tasks.serve import ENVIRONMENTS, cpu_flags
from tests.conftest import World

problems = {engine: environment_problem(name) for engine, name in ENVIRONMENTS.items()}


def served_arms(engine: str) -> list[str]:
    """What the engine serves of the small recipe on this CPU."""
    quantized = engine != "vllm" or "avx512f" in cpu_flags()
    return ["merged-dequantized", *(["gptq-w4-g128"] if quantized else [])]


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENVIRONMENTS))
def test_the_engine_serves_what_was_measured(world: World, engine: str):
    if problem := problems[engine]:
        pytest.skip(problem.next)
    arms = served_arms(engine)
    change = ("--set", f"serve.engine={engine}", "--set", "serve.arms=[gptq-w4-g128]")
    made = {key for key, hit in world.plan(*change).items() if not hit}
    assert made == {f"serve/{slug}" for slug in arms}
    world.quench("run", str(world.recipe), *change)
    served = world.report()["served"]
    assert set(served["arms"]) == set(arms)
    for slug in arms:
        arm = served["arms"][slug]
        apart = arm["differences"]["served_loss"]
        print(engine, slug, arm["verdict"], apart, arm["metrics"]["served_answers_equal"]["value"])
        # vLLM's 4-bit kernel on a CPU rounds three times as much as bf16 does (docs/results/rounding-vllm.md): its rows
        # may differ, its loss and its answers may not.
        rounds = engine == "vllm" and slug != "merged-dequantized"
        convicted = {check["name"] for check in arm["checks"] if check["outcome"] == "differs"}
        assert convicted <= ({"rows"} if rounds else set()), arm["checks"]
        # A fortieth of the gate's margin for the loss; or, of so few rows, what the floor's arithmetic may make.
        assert abs(apart["difference"]) < max(0.0005, apart["ci95"][1] - apart["ci95"][0])
        assert [load["requests"] for load in arm["loads"]] == [1, 8, 32]
    assert "merged-original" in served["not_served"]
    manifest = json.loads((world.home / str(world.steps()[f"serve/{arms[0]}"]["path"]) / "manifest.json").read_text())
    assert manifest["server"]["lock"] == lock_digest(ENVIRONMENTS[engine])
    assert all(world.plan(*change).values())


@pytest.mark.slow
@pytest.mark.skipif(problems["vllm"] is None, reason="the environment vllm is installed")
def test_without_the_engine_the_run_is_whole_and_says_so(world: World):
    world.quench("run", str(world.recipe), "--set", "serve.engine=vllm")
    served = world.report()["served"]
    assert not served["arms"] and "make env-vllm" in served["not_served"]["merged-dequantized"]
