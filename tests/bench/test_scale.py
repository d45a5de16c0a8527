"""The benchmark of the store on 200 artifacts: what it times is what it says."""

from __future__ import annotations

import re
from pathlib import Path

from tests.bench.scale import FIXED_ARMS, fill, measure, page

ARMS, SEEDS = 21, 5


def test_it_runs_on_200_artifacts(tmp_path: Path) -> None:
    world = fill(tmp_path, arms=ARMS, seeds=SEEDS)
    assert 190 <= world.artifacts <= 250
    results = {one.name: one for one in measure(world, rounds=1)}
    hits, steps = re.findall(r"\d+", results["plan, the sweep as it was run"].said)
    assert hits == steps and int(steps) > 2 * ARMS
    new = results["plan, the sweep with another training seed"].said
    assert new == f"3 hits of {steps} steps"  # prepare, rehearse, calibrate: nothing of theirs depends on the seed
    assert results["`quench store ls`"].said == f"{world.artifacts} artifacts"
    unreached = results["`quench store gc`"].said.removesuffix(", 0 removed")
    assert results["`quench store gc --yes`"].said == f"{unreached}, {unreached.split()[0]} removed"
    assert int(unreached.split()[0]) > 2 * (ARMS - FIXED_ARMS)  # what the run without a record made
    text = page(world, list(results.values()), arms=ARMS, seeds=SEEDS, commit_s=0.01)
    assert all(name in text for name in results) and f"{world.artifacts:,} artifacts" in text
