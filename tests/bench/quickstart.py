"""`make bench`: the quickstart in an empty QUENCH_HOME, timed; writes docs/results/quickstart.md and its picture.

Wall times are of this machine, with nothing else running on it; ratios between them are what carries over.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tasks.runtime.launch import CHECKOUT
from tests.chromium import screenshot

RECIPE = "recipes/quickstart/recipe.yaml"
RESULTS = CHECKOUT / "docs" / "results"
CHANGE = "quantize.schemes.2=gptq-w4-g64"  # was gptq-w4-g32
CHECKS = 5


class Timed(NamedTuple):
    """A command's seconds and the steps that it made."""

    seconds: float
    made: int
    hits: int


def timed(home: Path, *words: str) -> Timed:
    """Run `quench WORDS`, output passed on; count what latest/steps.json says."""
    clock = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        env={**os.environ, "QUENCH_HOME": str(home)},
        cwd=CHECKOUT,
        check=True,
    )
    seconds = time.monotonic() - clock
    steps = home / "runs" / "latest" / "steps.json"
    status = [one["status"] for one in json.loads(steps.read_text())["steps"]] if steps.exists() else []
    return Timed(seconds, status.count("made"), status.count("hit"))


def main() -> None:
    """Run, time, write."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        check = [timed(home, "check", RECIPE).seconds for _ in range(CHECKS)]
        first = timed(home, "run", RECIPE)
        latest = (home / "runs" / "latest").resolve()
        report = (latest / "report.md").read_text(encoding="utf-8")
        seed = json.loads((latest / "recipe.resolved.json").read_text())["train"]["seed"]
        RESULTS.mkdir(exist_ok=True)
        screenshot((latest / "report.html").as_uri(), RESULTS / "quickstart.png", width=1200, height=1010)
        second = timed(home, "run", RECIPE)
        changed = timed(home, "run", RECIPE, "--set", CHANGE)
    share = [second.seconds / first.seconds, changed.seconds / first.seconds]
    page = f"""<!-- Written by `make bench`. -->
# The quickstart, measured

`{RECIPE}`, training seed {seed}, in an empty QUENCH_HOME, nothing else on the machine.
Hardware and versions at the end.

| command | seconds | of the first run | steps made | hits |
| --- | ---: | ---: | ---: | ---: |
| `quench check {RECIPE}` (median of {CHECKS}) | {statistics.median(check):.2f} | | | |
| `quench run {RECIPE}` | {first.seconds:.0f} | 1 | {first.made} | {first.hits} |
| the same again | {second.seconds:.1f} | {share[0]:.3f} | {second.made} | {second.hits} |
| `... --set {CHANGE}` | {changed.seconds:.0f} | {share[1]:.3f} | {changed.made} | {changed.hits} |

![The top of report.html](quickstart.png)

## Report

The rest of this page is the first run's report.md.
"""
    body = report.partition("\n")[2].replace("\n## ", "\n### ")  # below this page's title
    (RESULTS / "quickstart.md").write_text(page + body, encoding="utf-8")
    print(f"wrote {RESULTS / 'quickstart.md'}")


if __name__ == "__main__":
    main()
