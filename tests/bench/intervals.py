"""`python -m tests.bench.intervals`: what intervals of many groups cost; writes docs/results/intervals.md.

CPU seconds and peak memory of the bootstrap at 1,000, 10,000 and 100,000 groups, every run in a process of its own.
Scores are generated, the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import hardware
from tests.bench.apart import apart, peak_kib

RUNS = {1_000: 5, 10_000: 3, 100_000: 1}  # groups -> runs; one of 100,000 takes minutes
ARMS = 6
SEED = 0
RESULTS = CHECKOUT / "docs" / "results"
PARTS = ("first", "again", "family")


def child(groups: int) -> dict[str, Any]:
    """One arm's interval, that of another arm, and the differences of all arms, as a report computes them."""
    import numpy as np

    from flows.results.cells import Draws
    from flows.results.stats import Estimand, Sums, difference_intervals, mean_interval, studentized

    rng = np.random.default_rng(SEED)
    count = rng.integers(20, 200, groups).astype(float)  # tokens
    arms = [Sums(rng.lognormal(0, 1, groups) * count, count) for _ in range(ARMS)]
    names = tuple(map(str, range(groups)))
    _ = np.ones((500, 500)) @ np.ones((500, 500))  # what BLAS reserves is no cost of an interval
    before, draws, seconds = peak_kib() / 1024, Draws(), dict[str, float]()
    for part, estimands in {
        "first": [Estimand(arms[0])],
        "again": [Estimand(arms[1])],
        "family": [Estimand(a, b) for a, b in combinations(arms, 2)],
    }.items():
        began = time.process_time()
        told = studentized(estimands, draws(names))
        _ = difference_intervals(told) if part == "family" else mean_interval(told[0])
        seconds[part] = time.process_time() - began
    return {"seconds": seconds, "before_mib": before, "peak_mib": peak_kib() / 1024, "kept": bool(draws.known)}


def page(runs: dict[int, list[dict[str, Any]]]) -> str:
    """docs/results/intervals.md."""
    from flows.results.cells import KEPT_BYTES
    from flows.results.draws import RESAMPLES

    lines: list[str] = []
    for groups, told in runs.items():
        seconds = [f"{statistics.median(run['seconds'][part] for run in told):,.2f}" for part in PARTS]
        above, peak = (max(run["peak_mib"] - start * run["before_mib"] for run in told) for start in (1, 0))
        kept = "kept" if told[0]["kept"] else "made anew"
        whole = f"{groups * RESAMPLES / 2**20:,.0f}"
        cells = [f"{groups:,}", str(len(told)), kept, *seconds, f"{above:,.0f}", f"{peak:,.0f}", whole]
        lines.append(f"| {' | '.join(cells)} |")
    machine, versions = hardware(), locked_versions()
    return f"""<!-- Written by `python -m tests.bench.intervals`. -->
# Intervals of many groups

What the bootstrap of the report costs by the number of groups of rows: {RESAMPLES:,} resamples, generated losses of
{ARMS} arms (seed {SEED}), one thread, n runs a size, a process of its own for each. CPU seconds are medians: of the
first interval of a mean, of another arm's on the same groups, and of the {ARMS * (ARMS - 1) // 2} differences of all
arms with their common interval. Memory is the highest of the runs.

| groups | n | draws | first, s | another, s | differences, s | MiB above the start | peak RSS, MiB | all draws, MiB |
| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

Draws come from a seed, in blocks. Those of up to {KEPT_BYTES // RESAMPLES:,} groups are kept while others are not used
more recently, {KEPT_BYTES // 2**20} MiB of them together; of more groups they are made anew for every interval. The
last column is what keeping all would take, for every set of rows of another size. The figures are the same either way,
bit for bit.

{machine["cpu"]}, {machine["cores"]} cores, shared with other work; numpy {versions["numpy"]}.
"""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of intervals.md")
    parser.add_argument("--child", type=int, metavar="GROUPS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    runs: dict[int, list[dict[str, Any]]] = {}
    for groups, number in RUNS.items():
        runs[groups] = [apart("tests.bench.intervals", str(groups)) for _ in range(number)]
        print(groups, runs[groups], flush=True)
    (options.out / "intervals.md").write_text(page(runs), encoding="utf-8")
    print(f"wrote {options.out / 'intervals.md'}")


if __name__ == "__main__":
    main()
