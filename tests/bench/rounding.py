"""`python -m tests.bench.rounding [RUN]`: whose rounding makes a served arm differ, docs/results/rounding-ENGINE.md.

For each 4-bit arm that a run (default: the latest) served: the loss of every row of test by the run's own evaluation
and by the engine, against the same model computed in fp32 with the weights that the file means by its format's
definition.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq
import torch

from flows.results.read import Run, read_run
from flows.run.folder import find_run
from tasks.jobs.measuring.teacher_forcing import TokenRow, batches, forced, read_rows
from tasks.jobs.measuring.tiles import Model, read_in_rows
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.store.local import find_home
from tests.jobs.quantized import fake_quantized

PAGES = CHECKOUT / "docs" / "results"
BATCH = 50
Rows = Mapping[str, tuple[float, int]]  # loss in nats and tokens of each row
HEAD = """<!-- Written by `python -m tests.bench.rounding`. -->
# Whose rounding makes a served arm differ

The weights that a 4-bit file means by its format's definition, computed in fp32, are what nobody rounds. Against them:
the losses of the rows of test by the report (transformers), by {engine} {version} on cpu, and of the same weights in
bf16 in transformers. *Rows off* is the mean absolute difference of a row, nats a token; in brackets the mean
difference, where what rounding does to one row cancels what it does to another.

| arm | kernel of the engine | the report | {engine} | bf16 weights |
| --- | --- | ---: | ---: | ---: |"""


def losses(model: Model, rows: list[TokenRow]) -> Rows:
    """Of the counted tokens of each row."""
    read_in_rows(model)
    found: dict[str, tuple[float, int]] = {}
    for batch in batches(rows, BATCH, key=lambda row: len(row.ids)):
        for row, stretches in zip(batch, forced(model, batch, lambda part: part.losses()[part.counted]), strict=True):
            found[row.row] = (torch.cat(stretches).sum().item(), row.n)
    return found


def stored(run: Run, key: str, metric: str) -> Rows:
    """The same of a step's scores.parquet."""
    lines = pq.read_table(run.steps[key].files / "scores.parquet").to_pylist()
    return {
        line["row"]: (line["sum"], line["n"]) for line in lines if (line["metric"], line["split"]) == (metric, "test")
    }


def off(some: Rows, exact: Rows) -> str:
    """`0.00042 (+0.000001)`."""
    pairs = [(some[row][0] - exact[row][0], exact[row][1]) for row in some.keys() & exact.keys()]
    tokens = sum(count for _, count in pairs)
    rows, mean = sum(abs(apart) for apart, _ in pairs) / tokens, sum(apart for apart, _ in pairs) / tokens
    return f"{rows:.5f} ({mean:+.6f})"


def lines(run: Run, report: Mapping[str, Any]) -> Iterator[str]:
    """A row of the table for each arm."""
    by_stage = {step.stage: step.files for step in run.steps.values()}
    rows = read_rows(by_stage["prepare"], "test")
    for slug, told in report["served"]["arms"].items():
        arm = run.arm(slug)
        if not told.get("kernel"):
            continue
        merged = run.home / run.steps[arm.model].manifest["inputs"]["model"]["path"]
        model = fake_quantized(merged, run.steps[arm.model].files, slug)
        rounded, exact = losses(model, rows), losses(model.float(), rows)
        own, served = stored(run, f"evaluate/{slug}", "nll"), stored(run, f"serve/{slug}", "served_nll")
        yield f"| {slug} | {told['kernel']} | {off(own, exact)} | {off(served, exact)} | {off(rounded, exact)} |"


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    home = find_home()
    folder = find_run(home, sys.argv[1] if len(sys.argv) > 1 else None)
    run, report = read_run(folder, home), json.loads((folder / "report.json").read_text(encoding="utf-8"))
    told = next(iter(report["served"]["arms"].values()))
    machine = report["hardware"]
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("torch", "transformers", "gptqmodel"))
    text = [HEAD.format(engine=told["engine"], version=told["version"]), *lines(run, report)]
    n = told["differences"]["served_loss"]["n"]
    text += ["", f"{n} rows of test, seeds as in the recipe; {machine['cpu']}, {machine['cores']} cores; {versions}."]
    path = PAGES / f"rounding-{told['engine']}.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
