"""docs/results/operations.md, composed from the results that are there: kills.json and overheads.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tasks.runtime.launch import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"


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

A home starts empty; its recipe is run again after each kill, at last to the end, and then compared with a run that
nobody disturbed ({told["undisturbed"]["seconds"]:.0f} s). The moment is drawn evenly over what the run
has left to do; where no such process lives then, the next one is killed.

A home holds where no committed step was made twice and none of its files changed, every step has the digest that it has
in the undisturbed run, and the loss curve is that one's within {told["tolerance"]:g} (as in tests/jobs/test_train.py):
{held} of {len(homes)} do.
{said}
{table}

{machine["cpu"]}, {machine["cores"]} cores with other work beside; {versions}.
"""


SECTIONS = {"kills.json": kills}


def page(folder: Path) -> str:
    """The page of the results in a folder."""
    parts = [
        render(json.loads((folder / name).read_text(encoding="utf-8")))
        for name, render in SECTIONS.items()
        if (folder / name).exists()
    ]
    return "\n".join(["<!-- Written by `python -m tests.bench.operations`. -->\n# Operations, measured\n", *parts])


def write(folder: Path = RESULTS) -> None:
    """Write the page again."""
    (folder / "operations.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    write()
