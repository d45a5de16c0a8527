"""docs/results/operations.md, composed from the results that are there: kills.json and overheads.json."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.runtime.process.launch import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"
AIM, AIM_MINUTES = 1.03, 10.0


class Median(NamedTuple):
    """A median with its interval from order statistics, and what the interval covers."""

    median: float
    low: float
    high: float
    n: int
    coverage: float


def median(values: Sequence[float]) -> Median:
    """The narrowest interval between two order statistics of equal rank that covers the median in 95 % of all cases.

    With five values or fewer there is none; then the smallest and the largest stand, and `coverage` says for how much.
    """
    ordered, n = sorted(values), len(values)

    def covers(rank: int) -> float:
        return 1 - 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n

    rank = max((one for one in range(1, n // 2 + 1) if covers(one) >= 0.95), default=1)
    return Median(statistics.median(ordered), ordered[rank - 1], ordered[-rank], n, max(0.0, covers(rank)))


def kills(told: dict[str, Any]) -> str:
    """The kill table."""
    homes = {home["home"]: home for home in told["homes"]}
    lines = [
        "| | home | killed | after, s | during | steps kept | exit | ended after, s | home at its end |",
        "| ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for one in told["kills"]:
        home = homes[one["home"]]
        end = f"{home['equal']} of {home['steps']} digests equal, loss off by {home['curve_off']:g}"
        cells = [one["number"] + 1, one["home"] + 1, one["victim"], one["moment_s"], one["during"], one["kept"]]
        cells += [one["exit"], one["ended_s"], end if home["holds"] else f"**does not hold**: {end}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    counted = Counter(one["victim"] for one in told["kills"])
    victims = ", ".join(f"{count} x {name}" for name, count in sorted(counted.items()))
    held = sum(home["holds"] for home in told["homes"])
    machine, versions = told["hardware"], ", ".join(f"{name} {text}" for name, text in told["versions"].items())
    faults = [f"* home {home['home'] + 1}: {fault}" for home in told["homes"] for fault in home["faults"]]
    table, said = "\n".join(lines), "\n".join(["", *faults, ""]) if faults else ""
    return f"""## SIGKILL at a random moment

`python -m tests.bench.kills --runs {len(told["kills"])} --seed {told["seed"]}`: {len(told["kills"])} runs of a small
recipe ({len(told["undisturbed"]["steps"])} steps, from prepare to evaluate), each with one SIGKILL ({victims}), in
{len(homes)} home{"s" if len(homes) > 1 else ""}.

A home starts empty; its recipe is run again after each kill, finally to the end, and then compared with a run that
was not disturbed ({told["undisturbed"]["seconds"]:.0f} s). The moment is drawn evenly over what the run
has left to do; where no such process lives then, the next one is killed.

A home holds where no committed step was made twice and none of its files changed, every step has the digest that it has
in the undisturbed run, and the loss curve is that one's within {told["tolerance"]:g} (as in tests/jobs/test_train.py):
{held} of {len(homes)} do.
{said}
{table}

{machine["cpu"]}, {machine["cores"]} cores with other work beside; {versions}.
"""


def overheads(told: Mapping[str, Any]) -> str:
    """The section of docs/results/operations.md."""

    def rows(part: str) -> str:
        found = {name: median(values) for name, values in told[part].items()}
        return "\n".join(
            f"| {name} | {one.median:.2f} | {one.low:.2f} to {one.high:.2f} | {one.n} |" for name, one in found.items()
        )

    ratio = median([one["ratio"] for one in told["pairs"]])
    pairs = "\n".join(
        f"| {one['pair'] + 1} | {one['first']} | {one['run_s']:.0f} | {one['script_s']:.0f} | {one['ratio']:.3f} |"
        for one in told["pairs"]
    )
    step = {name: statistics.median(values) for name, values in told["step_s"].items()}
    added = step["Prefect's task and run_step"] - step["bare child"]
    least = min(one["script_s"] for one in told["pairs"]) / 60
    long = least >= AIM_MINUTES
    more = [one["run_s"] - one["script_s"] for one in told["pairs"]]
    verdict = ("held" if ratio.high <= AIM else "not held") if long else "not judged: the work was shorter than that"
    machine, versions = told["hardware"], ", ".join(f"{name} {text}" for name, text in told["versions"].items())
    return f"""## What the orchestration costs

`{told["command"]}`, one CPU slot, one thread per step. Medians; intervals from order statistics, which cover 95 % or
more with six values or more (n pairs: {ratio.n}, covering {100 * ratio.coverage:.0f} %).

| start-up, seconds | median | interval | n |
| --- | ---: | ---: | ---: |
{rows("start_up_s")}

| a step that does nothing, seconds | median | interval | n |
| --- | ---: | ---: | ---: |
{rows("step_s")}

A step costs {added:.2f} s beside its work and the start of a Python: lease, child with our runtime, digests, commit,
and Prefect's task. What a job imports (torch, transformers) is added to that: in every step, and in a script once:

| what a step imports, seconds | median | interval | n |
| --- | ---: | ---: | ---: |
{rows("import_s")}

A whole run ({told["pairs"][0]["steps"]} steps of the quickstart's recipe, {told["train_steps"]} of training) against a
script that does the same jobs one after another in one process, without children, store, Prefect, MLflow and report:

| pair | first | `quench run`, s | script, s | ratio |
| ---: | --- | ---: | ---: | ---: |
{pairs}

Ratio {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}). The aim is {AIM} on work of {AIM_MINUTES:g} minutes
or more: {verdict}. The difference is {statistics.median(more):.0f} s, most of it what steps import: each is a
process of its own, so that no memory, crash or kill of one reaches another. An import takes as long, however long the
step works.

{machine["cpu"]}, {machine["cores"]} cores; {versions}.
"""


SECTIONS = {"overheads.json": overheads, "kills.json": kills}
PICTURES = """## What people see

`python -m tests.bench.screenshots HOME`, on the pages of `quench up`: a run with its artifacts, and the deployment that
retrains, with its schedule.

![Prefect's page of a run](../screenshots/prefect-run.png)

![Prefect's page of the deployment retrain, with a schedule](../screenshots/prefect-deployment.png)
"""


def page(folder: Path) -> str:
    """The page of the results in a folder."""
    parts = [
        render(json.loads((folder / name).read_text(encoding="utf-8")))
        for name, render in SECTIONS.items()
        if (folder / name).exists()
    ]
    return "\n".join(
        ["<!-- Written by `python -m tests.bench.operations`. -->\n# Operations, measured\n", *parts, PICTURES]
    )


def write(folder: Path = RESULTS) -> None:
    """Write the page again."""
    (folder / "operations.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    write()
