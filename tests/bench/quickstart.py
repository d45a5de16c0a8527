"""`make bench`: the quickstart in an empty QUENCH_HOME, timed, then with another seed and with another split.

Writes docs/results/quickstart.md, and the first run's report with its picture as docs/results/quickstart-report.md.
`python -m tests.bench.quickstart --report RUN_FOLDER` writes the latter alone, of a run that is there already.

Wall times are of this machine, with nothing else running on it; ratios between them are what carries over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from flows.results.metrics import difference_text
from tasks.runtime.process.launch import CHECKOUT
from tests.chromium import screenshot

RECIPE = "recipes/quickstart/recipe.yaml"
RESULTS = CHECKOUT / "docs" / "results"
CHANGE = "quantize.schemes.2=gptq-w4-g64"  # was gptq-w4-g32
CHECKS = 5
VARIANTS = ("train.seed=1", "data.salt=b")
SHORT = (
    "quantize.schemes=[gptq-w3-g128, rtn-w3-g128]",
    "evaluate.on_base=[]",
    "evaluate.kv_cache=[]",
    "measure.enabled=false",
)


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


def spread(name: str, report: dict[str, Any]) -> dict[str, str]:
    """One seed or split: what has to hold of the quickstart, by column."""
    arms = report["arms"]

    def task(slug: str) -> str:
        return f"{100 * arms[slug]['metrics']['task']['value']:.1f}"

    def kl(slug: str) -> str:
        return f"{arms[slug]['metrics']['kl_mean']['value']:.2g}"

    def difference(a: str, b: str, metric: str) -> str:
        wanted = (a, b, metric)
        (one,) = [one for one in report["comparisons"] if (one["a"], one["b"], one["metric"]) == wanted]
        return f"{difference_text(metric, one['difference'], one['ci95_adjusted'])}: {one['verdict']}"

    cells = {
        "change": name,
        "n": str(arms["base"]["metrics"]["task"]["n"]),
        **{f"task {slug}": task(slug) for slug in ("base", "nf4-adapter", "merged-dequantized", "rtn-w3-g128")},
        "task, rtn-w3 - merged": difference("rtn-w3-g128", "merged-dequantized", "task"),
        "KL, rtn-w3 - gptq-w3": difference("rtn-w3-g128", "gptq-w3-g128", "kl_mean"),
        **{f"KL {slug}": kl(slug) for slug in ("base", "merged-dequantized", "merged-original")},
        "KL, dequantized - original": difference("merged-dequantized", "merged-original", "kl_mean"),
    }
    return cells


def latest_report(home: Path) -> dict[str, Any]:
    """report.json of the run that ended last."""
    return json.loads((home / "runs" / "latest" / "report.json").read_text(encoding="utf-8"))


def write_report(run: Path) -> None:
    """The run's report.md as a page, and the top of its report.html as a picture."""
    seed = json.loads((run / "recipe.resolved.json").read_text(encoding="utf-8"))["train"]["seed"]
    body = (run / "report.md").read_text(encoding="utf-8").partition("\n")[2]
    page = f"""<!-- Written by `python -m tests.bench.quickstart`. -->
# The quickstart's report

What `quench run {RECIPE}` writes as report.md, training seed {seed}. Hardware and versions at the end; seconds are of
that day's machine, which may have had other work: nothing here rests on them.

![The top of report.html](quickstart.png)
"""
    (RESULTS / "quickstart-report.md").write_text(page + body, encoding="utf-8")
    screenshot((run / "report.html").as_uri(), RESULTS / "quickstart.png", width=1280, height=1080)
    print(f"wrote {RESULTS / 'quickstart-report.md'}")


def main() -> None:
    """Run, time, write; or write the report of a run that is there."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--report", type=Path, metavar="RUN_FOLDER", help="write the page of this run's report alone")
    run = options.parse_args().report
    if run is not None:
        write_report(run)
    else:
        measure()


def measure() -> None:
    """Run, time, write."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        check = [timed(home, "check", RECIPE).seconds for _ in range(CHECKS)]
        first = timed(home, "run", RECIPE)
        latest = (home / "runs" / "latest").resolve()
        seed = json.loads((latest / "recipe.resolved.json").read_text())["train"]["seed"]
        write_report(latest)
        rows = [spread("as it is", latest_report(home))]
        second = timed(home, "run", RECIPE)
        changed = timed(home, "run", RECIPE, "--set", CHANGE)
        for variant in VARIANTS:
            timed(home, "run", RECIPE, *(word for one in (variant, *SHORT) for word in ("--set", one)))
            rows.append(spread(f"`{variant}`", latest_report(home)))
    share = [second.seconds / first.seconds, changed.seconds / first.seconds]
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    page = f"""<!-- Written by `make bench`. -->
# The quickstart, measured

`{RECIPE}`, training seed {seed}, in an empty QUENCH_HOME. Wall times are of that day's machine: read them as ratios.
Hardware and versions: at the end of [its report](quickstart-report.md).

| command | seconds | of the first run | steps made | hits |
| --- | ---: | ---: | ---: | ---: |
| `quench check {RECIPE}` (median of {CHECKS}) | {statistics.median(check):.2f} | | | |
| `quench run {RECIPE}` | {first.seconds:.0f} | 1 | {first.made} | {first.hits} |
| the same again | {second.seconds:.1f} | {share[0]:.3f} | {second.made} | {second.hits} |
| `... --set {CHANGE}` | {changed.seconds:.0f} | {share[1]:.3f} | {changed.made} | {changed.hits} |

## Over seeds and splits

Task in %, execution accuracy on test rows; KL in nats a completion token, to nf4-adapter; differences with the 95 %
interval that holds for their whole family, and the report's word about them.

{table}
"""
    (RESULTS / "quickstart.md").write_text(page, encoding="utf-8")
    print(f"wrote {RESULTS / 'quickstart.md'}")


if __name__ == "__main__":
    main()
