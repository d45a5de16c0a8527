"""`python -m tests.bench.scale`: plan, listing and gc on a store of 10,000 artifacts; writes docs/results/scale.md.

The artifacts are a sweep of the quickstart, composed and committed by production code: 1,000 arms, each with a quantize
and an evaluate step, trained with several seeds. Their files are a few bytes long: nothing here reads weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flows.commands.store import collect, listed
from flows.compose import compose
from flows.pins import Pins, pin
from flows.plan.lookup import known_inputs, plan
from recipes.read.load import Loaded, load
from recipes.schema import Recipe
from tasks.runtime.process.environments import described, locked_versions
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import Step, hardware, lookup
from tasks.runtime.store.local import Artifact, Store, write_json

RECIPE = CHECKOUT / "recipes" / "quickstart" / "recipe.yaml"
PAGE = CHECKOUT / "docs" / "results" / "scale.md"
ARMS, SEEDS = 1000, 5  # 2 steps an arm and some 20 shared ones a seed: 10,000 artifacts
ROUNDS = 5
GOAL_S = 1.0
FIXED_ARMS = 5  # base, base-nf4, nf4-adapter and the two merges


class Timed(NamedTuple):
    """Seconds of one operation, over rounds; CPU seconds are those of this process."""

    name: str
    wall: list[float]
    cpu: list[float]
    said: str


@dataclass(frozen=True, kw_only=True)
class World:
    """A filled store and the recipe that filled it."""

    home: Path
    recipe: Recipe
    pins: Pins
    artifacts: int


def sweep(folder: Path, *, arms: int) -> Loaded:
    """The quickstart with as many arms: which of its layers stay in bf16, by the bits of the arm's number."""
    schemes: list[dict[str, Any]] = []
    for number in range(1, arms - FIXED_ARMS + 1):
        kept = [bit for bit in range(number.bit_length()) if number >> bit & 1]
        rule = {"match": rf"layers\.({'|'.join(map(str, kept))})\.", "keep": True}
        schemes.append({"scheme": "ct-gptq-w4-g128", "name": f"kept-{number:04d}", "rules": [rule]})
    asked = {
        "extends": str(RECIPE),
        "quantize": {"schemes": schemes},
        "evaluate": {"on_base": [], "kv_cache": []},
        "measure": {"enabled": False},
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(asked), encoding="utf-8")  # JSON is YAML
    return load(path)


def reseeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another training seed: every step from train on is another one."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


def fill(folder: Path, *, arms: int, seeds: int) -> World:
    """Commit every step of the sweep, for each seed; all runs but the last have a record."""
    home = folder / "home"
    loaded = sweep(folder, arms=arms)
    pins, store = pin(loaded, home), Store(home)
    for seed in range(seeds):
        made: dict[str, Artifact] = {}

        def commit(step: Step, made: dict[str, Artifact] = made) -> None:
            inputs = known_inputs(step, made)
            assert inputs is not None
            made[step.key] = _committed(store, step, inputs)

        compose(reseeded(loaded.recipe, seed), pins, commit)
        if seed < seeds - 1:
            run = home / "runs" / f"run-{seed}"
            run.mkdir(parents=True)
            steps = [{"key": key, "path": str(one.path.relative_to(home))} for key, one in made.items()]
            write_json(run / "steps.json", {"steps": steps})
    return World(home=home, recipe=loaded.recipe, pins=pins, artifacts=len(list(store.manifests())))


def _committed(store: Store, step: Step, inputs: dict[str, Artifact]) -> Artifact:
    """The step's artifact: found, or made of a few bytes that are its own, with the manifest of run_step."""
    if found := lookup(step, inputs, store).artifact:
        return found
    attempt = store.begin(step.stage, step.slug, step.fingerprint, inputs={n: one.digest for n, one in inputs.items()})
    (attempt.files / "content.txt").write_text(step.fingerprint, encoding="utf-8")
    if step.stage == "choose":
        (attempt.files / "choice.json").write_text('{"candidate": "dequantized"}', encoding="utf-8")
    (attempt.own / "log.txt").write_text("", encoding="utf-8")
    manifest = {
        "stage": step.stage,
        "slug": step.slug,
        "fingerprint": step.fingerprint,
        "identity": step.identity,
        "inputs": {
            name: {"fingerprint": one.fingerprint, "digest": one.digest, "path": _path(one.path, store.home)}
            for name, one in inputs.items()
        },
        "result": {},
        "seconds": 1.0,
        "finished_at": "2026-01-01T00:00:00+00:00",
        "hardware": hardware(),
        "environment": described(step.environment),
    }
    return store.commit(attempt, manifest)


def _path(path: Path, home: Path) -> str:
    return str(path.relative_to(home)) if path.is_relative_to(home) else str(path)


def timed(name: str, work: Callable[[], str], *, rounds: int) -> Timed:
    """Do it some times; the last one says what it did."""
    wall: list[float] = []
    cpu: list[float] = []
    said = ""
    for _ in range(rounds):
        at, used = time.perf_counter(), time.process_time()
        said = work()
        wall.append(time.perf_counter() - at)
        cpu.append(time.process_time() - used)
    return Timed(name, wall, cpu, said)


def measure(world: World, *, rounds: int) -> list[Timed]:
    """Plans, a listing and gc, as the commands do them; what removes is last and done once."""
    home, quickstart = world.home, load(RECIPE)
    pins = pin(quickstart, home)

    def planned(recipe: Recipe, pinned: Pins) -> str:
        lines = plan(recipe, pinned, Store(home))
        return f"{sum(one.hit for one in lines)} hits of {len(lines)} steps"

    def collected(*, remove: bool) -> str:
        found = collect(home, remove=remove).json
        return f"{len(found['unreached'])} unreached, {len(found['removed'])} removed"

    new = reseeded(world.recipe, 1_000)
    return [
        timed("plan, the sweep as it was run", lambda: planned(world.recipe, world.pins), rounds=rounds),
        timed("plan, the sweep with another training seed", lambda: planned(new, world.pins), rounds=rounds),
        timed("plan, the quickstart in this store", lambda: planned(quickstart.recipe, pins), rounds=rounds),
        timed("`quench store ls`", lambda: f"{len(listed(home).json)} artifacts", rounds=rounds),
        timed("`quench store gc`", lambda: collected(remove=False), rounds=rounds),
        timed("`quench store gc --yes`", lambda: collected(remove=True), rounds=1),
    ]


def page(world: World, results: list[Timed], *, arms: int, seeds: int, commit_s: float) -> str:
    """docs/results/scale.md."""
    machine, versions = hardware(), locked_versions()
    rows = "\n".join(
        f"| {one.name} | {one.said} | {statistics.median(one.wall):.2f} | {min(one.wall):.2f} | "
        f"{statistics.median(one.cpu):.2f} | {len(one.wall)} |"
        for one in results
    )
    return f"""<!-- Written by `python -m tests.bench.scale`. -->
# A store of 10,000 artifacts, measured

A sweep of {arms} arms over the quickstart, trained with {seeds} seeds: {world.artifacts:,} artifacts, composed and
committed by production code with files of a few bytes. The goal is {GOAL_S:.0f} s for each plan, the listing and gc;
removing has none. Seconds, without Python's start; wall time is of a machine with other work on it, CPU time is this
process's.

| operation | | median | least | CPU, median | rounds |
| --- | --- | ---: | ---: | ---: | ---: |
{rows}

A commit took {1000 * commit_s:.1f} ms, its plan and its synced manifest included.

Training seeds 0 to {seeds - 1}; {machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB; Python
3.11, pydantic {versions["pydantic"]}, pyyaml {versions["pyyaml"]}.
"""


def main() -> None:
    """Fill, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", type=int, default=ARMS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        world = fill(Path(folder), arms=asked.arms, seeds=asked.seeds)
        commit_s = (time.perf_counter() - clock) / world.artifacts
        print(f"{world.artifacts} artifacts in {time.perf_counter() - clock:.0f} s", flush=True)
        results = measure(world, rounds=asked.rounds)
    for one in results:
        print(f"{one.name}: {one.said}: {statistics.median(one.wall):.2f} s, CPU {statistics.median(one.cpu):.2f} s")
    asked.out.write_text(page(world, results, arms=asked.arms, seeds=asked.seeds, commit_s=commit_s), encoding="utf-8")
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
