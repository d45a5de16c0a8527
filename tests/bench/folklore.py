"""What the field repeats, held against the quickstart: runs it with several seeds, writes docs/results/folklore.md.

    python -m tests.bench.folklore [--home FOLDER] [--seed N ...] [--render | --claims] [--recipe FILE] [--out FILE]

A seed that has finished in the home is not run again, and one that was interrupted goes on. `--render` runs nothing:
the page is written from the finished runs alone. `--claims` writes its last section again, which needs no run:
published figures that carry their n (tests/bench/claims-with-n.csv). Ten to fifteen minutes a seed on two quiet cores;
`make env-llmcompressor` before, or the claim about mixed groups says what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flows.results.read import Run, read_run
from recipes.read.load import load
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.store.local import find_home
from tests.bench.claims import CLAIMS, GRADIENTS, Claim
from tests.bench.gradient_flow import FORMATS, ROWS, Flow, flows_of, told
from tests.bench.gradient_flow import verdict as flow_verdict
from tests.bench.probes import DEQUANTIZED, Better, Evidence, Missing, Probe, Seen, verdict
from tests.bench.published import HEADING, section

RESULTS = CHECKOUT / "docs" / "results" / "folklore.md"
RECIPE = CHECKOUT / "tests" / "bench" / "folklore.yaml"
ORIGINAL = RECIPE.with_name("folklore-original.yaml")  # the same trainings, merged into the original base
SEEDS = (0, 1, 2)


class Told(NamedTuple):
    """A probe over all seeds: figures by seed, why one has none, and the verdict."""

    label: str
    seen: dict[int, Seen]
    missing: dict[int, str]
    verdict: str


def run_seed(recipe: Path, seed: int, home: Path) -> None:
    """`quench run` with this training seed; what the home has is not made again. Failed arms fail their own cells."""
    subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(recipe), "--set", f"train.seed={seed}"],
        env={**os.environ, "QUENCH_HOME": str(home)},
        cwd=CHECKOUT,
        check=False,
    )


def finished(recipe: Path, home: Path) -> dict[int, Run]:
    """The last run of each seed of this recipe that wrote a report, read."""
    wanted = load(recipe).recipe.model_dump(mode="json")
    found: dict[int, Run] = {}
    for folder in sorted((home / "runs").glob("*-*")):
        resolved = folder / "recipe.resolved.json"
        if folder.is_symlink() or not resolved.exists() or not (folder / "report.json").exists():
            continue
        raw = json.loads(resolved.read_text(encoding="utf-8"))
        if all(raw[part] == wanted[part] for part in ("name", "quantize", "data", "merge")):
            found[raw["train"]["seed"]] = read_run(folder, home)
    return found


def gradient_flow(run: Run, home: Path) -> list[Flow]:
    """Measured once a home, on the first seed's artifacts."""
    kept = home / "folklore-gradients.json"
    if kept.exists():
        return [Flow(*one) for one in json.loads(kept.read_text(encoding="utf-8"))]
    files = {key: step.files for key, step in run.steps.items() if step.ok and step.files}
    merged = next((path for key, path in files.items() if key.startswith("merge/") and "dequantized" in key), None)
    dataset = next((path for key, path in files.items() if key.startswith("prepare/")), None)
    if merged is None or dataset is None:
        return []
    quantized = {slug: files[f"quantize/{slug}"] for slug in FORMATS if f"quantize/{slug}" in files}
    found = flows_of(merged, quantized, dataset)
    kept.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


Seeds = dict[str, dict[int, Evidence]]
"""Base of the merge -> seed -> what its run left."""


def asked(probe: Probe, seeds: Seeds) -> Told:
    """One probe over all seeds."""
    seen: dict[int, Seen] = {}
    missing: dict[int, str] = {}
    merge = probe.merge if isinstance(probe, Better) else DEQUANTIZED
    for seed, evidence in seeds.get(merge, {}).items():
        try:
            seen[seed] = probe.seen(evidence)
        except Missing as error:
            missing[seed] = str(error)
    return Told(probe.label, seen, missing, verdict(probe, list(seen.values())))


def row(claim: Claim, seeds: Seeds, flows: list[Flow]) -> list[str]:
    """The cells of one claim."""
    answers = [asked(probe, seeds) for probe in claim.probes]
    found = [_figures(one) for one in answers]
    if claim.computed:
        found.append(claim.computed())
    if claim.extra == GRADIENTS:
        found.append(f"{told(flows)}. *{flow_verdict(flows)}*" if flows else "no run")
    if claim.untestable:
        found.append(claim.untestable)
    n = "; ".join(sorted({seen.n for one in answers for seen in one.seen.values()}))
    if claim.probes:
        n += f"; seeds {', '.join(str(seed) for seed in seeds[DEQUANTIZED])}"
    elif claim.extra:
        n = f"{ROWS} rows; seed {min(seeds[DEQUANTIZED])}"
    return [claim.said, claim.how, "<br>".join(found), n, claim.limits]


def _figures(one: Told) -> str:
    """Figures of all seeds and what they say together."""
    if not one.seen:
        return f"{one.label}: *not measured* ({next(iter(one.missing.values()), 'no run')})"
    by_seed = [seen.text for _, seen in sorted(one.seen.items())]
    gaps = [f"seed {seed}: none ({why})" for seed, why in sorted(one.missing.items())]
    return f"{one.label}: {'; '.join([*by_seed, *gaps])}. *{one.verdict}*"


def _lines(cells: list[list[str]]) -> Iterator[str]:
    head = ["claim", "how", "figures, one per seed, and *what they say*", "n", "what the tiny model cannot say"]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for line in cells:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"


def page(runs: dict[str, dict[int, Run]], flows: list[Flow]) -> str:
    """docs/results/folklore.md."""
    seeds = {merge: {seed: Evidence.of(run) for seed, run in sorted(some.items())} for merge, some in runs.items()}
    table = "\n".join(_lines([row(claim, seeds, flows) for claim in CLAIMS]))
    raw: dict[str, Any] = dict(next(iter(runs[DEQUANTIZED].values())).raw)
    machine, named = raw["hardware"], ", ".join(map(str, seeds[DEQUANTIZED]))
    few = len(seeds[DEQUANTIZED]) < len(SEEDS)
    interim = f" **Interim: {len(seeds[DEQUANTIZED])} of {len(SEEDS)} seeds.**" if few else ""
    return f"""<!-- Written by `python -m tests.bench.folklore`. -->
# Folklore, measured

What people repeat about 4-bit models, one claim per row: measured on the quickstart (5.8 M parameters, questions to
SQL), computed, or not testable here. `tests/bench/folklore.yaml` with train.seed {named}: the same data and splits,
another adapter, merged into the dequantized base unless a line says otherwise. Differences are paired, on test, with
the 95 % interval of that one comparison (groups resampled, flows/results/stats.py), not adjusted for the number of rows
in this table; KL is to the model as it was trained (nf4-adapter). A claim is *shown* in a seed where its interval lies
wholly on the claimed side. The opposite is shown where it lies wholly on the other side. The rest is open. Seeds of one
task on one tiny model prove nothing about 7 B; they say what would have to be measured there.{interim}

{table}

{machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB;
{", ".join(f"{name} {version}" for name, version in raw["versions"].items())}.

{section()}"""


def with_claims(text: str) -> str:
    """A page with its last section written again."""
    return f"{text.partition(HEADING)[0].rstrip()}\n\n{section()}"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="QUENCH_HOME of the runs")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--original", type=Path, default=ORIGINAL, help="the same with merge.base: original")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--claims", action="store_true", help="run nothing, write the section of published figures")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.claims:
        args.out.write_text(with_claims(args.out.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the published figures of {args.out}")
        return
    home, seeds = (args.home or find_home()).resolve(), args.seed or list(SEEDS)
    recipes = {DEQUANTIZED: args.recipe, "original": args.original}
    if not args.render:
        for recipe in recipes.values():
            done = {seed for seed, run in finished(recipe, home).items() if run.raw["status"] == "completed"}
            for seed in sorted(set(seeds) - done):
                run_seed(recipe, seed, home)
    runs = {
        merge: {seed: run for seed, run in finished(recipe, home).items() if seed in seeds}
        for merge, recipe in recipes.items()
    }
    main_runs = runs[DEQUANTIZED]
    if not main_runs:
        raise SystemExit(f"no finished run of {args.recipe} with train.seed {seeds} in {home}")
    flows = gradient_flow(main_runs[min(main_runs)], home)
    args.out.write_text(page(runs, flows), encoding="utf-8")
    print(f"wrote {args.out}, seeds {sorted(main_runs)}")


if __name__ == "__main__":
    main()
