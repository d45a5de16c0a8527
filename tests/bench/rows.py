"""`python -m tests.bench.rows`: prepare and `quench check --data` on rows of any number; writes docs/results/rows.md.

Rows a second of CPU time and peak memory at 10,000, 100,000 and 1,000,000 rows of about 100 tokens. Every figure is of
a process of its own. Rows are generated, the same on every machine. A size that is measured is kept in
docs/results/rows.json, so that an interrupted benchmark goes on; `--rows N` measures one size again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.events import read_events
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import hardware
from tests.bench.apart import apart, peak_kib
from tests.jobs.build import make_job

SIZES = (10_000, 100_000, 1_000_000)
RESULTS = CHECKOUT / "docs" / "results"
BASE = CHECKOUT / "recipes" / "quickstart" / "base"
SEED = 0
WORDS = 26  # of a question; its answer has 6: about 100 tokens of the quickstart's tokenizer, template included
GOAL_ROWS_S, GOAL_GIB = 2000, 2.0
PHASES = {"format": "reading", "leaks": "near-duplicates", "mask": "tokenising"}  # the note that ends each


def texts(count: int) -> Iterator[str]:
    """JSONL lines of rows: words of the quickstart's questions, drawn for each row by its number."""
    lines = (CHECKOUT / "recipes" / "quickstart" / "data" / "sql.jsonl").read_text(encoding="utf-8").splitlines()
    questions = " ".join(json.loads(line)["messages"][-2]["content"] for line in lines)
    words = sorted({word for word in questions.split() if word.isalpha()})
    for number in range(count):
        drawn = random.Random(f"{SEED}:{number}").choices(words, k=WORDS + 6)
        turns = [
            {"role": "user", "content": f"{' '.join(drawn[:WORDS])} {number} ?"},
            {"role": "assistant", "content": " ".join(drawn[WORDS:])},
        ]
        yield json.dumps({"messages": turns}) + "\n"


def project(folder: Path, count: int) -> Path:
    """rows.jsonl and the recipe that reads it."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(texts(count))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: rows\nmodel: {{base: {BASE}}}\ndata: {{path: rows.jsonl, max_length: 256}}\n"
        "calibrate: {seq_len: 256}\nquantize: {schemes: [rtn-w4-g128]}\nmeasure: {prompt_tokens: 64, new_tokens: 16}\n",
        encoding="utf-8",
    )
    return recipe


def prepare(folder: Path, out: Path) -> dict[str, Any]:
    """The prepare job as a run starts it, on one thread. Memory counts from where the tokenizer is open."""
    from recipes.read.load import load
    from tasks import prepare as stage
    from tasks.jobs import prepare as body
    from tasks.jobs.text.rendering import Renderer
    from tasks.runtime.step import External

    loaded = load(folder / "recipe.yaml")
    sources = {name: External(name=name, path=folder, digest=name, source=name) for name in ("data", "tokenizer")}
    params = stage.step(loaded.recipe, data=[sources["data"]], tokenizer=sources["tokenizer"]).params
    job = make_job("prepare", out, params=params, data=folder / "rows.jsonl", tokenizer=BASE)
    Renderer.open(BASE)
    before, clock, cpu, began = peak_kib() / (1 << 20), time.monotonic(), time.process_time(), time.time()
    summary = body.run(job)
    figures = {"s": time.monotonic() - clock, "cpu_s": time.process_time() - cpu, "before_gib": before}
    ends = {event["about"]: event["t"] for event, _ in read_events(out / "events.jsonl") if event["kind"] == "note"}
    phases: dict[str, float] = {}
    for about, phase in PHASES.items():
        phases[phase] = ends[about] - began
        began = ends[about]
    phases["writing"] = figures["s"] - sum(phases.values())
    rows = {name: summary["rows"][name] for name in ("train", "dev", "test")}
    return figures | {"phases": phases, "kept": rows, "tokens": sum(summary["tokens"].values())}


def check(folder: Path, out: Path) -> dict[str, Any]:
    """`quench check --data`."""
    from recipes.checks.check import load_and_read

    before, clock, cpu = peak_kib() / (1 << 20), time.monotonic(), time.process_time()
    summary = load_and_read(folder / "recipe.yaml", data=True).rows.summary
    out.mkdir()
    kept = {name: summary[name]["rows"] for name in ("train", "dev", "test")}
    return {"s": time.monotonic() - clock, "cpu_s": time.process_time() - cpu, "before_gib": before, "kept": kept}


COMMANDS = {"prepare": prepare, "check": check}


def measure(count: int) -> dict[str, Any]:
    """Both commands on so many rows."""
    with tempfile.TemporaryDirectory(prefix="quench-rows-") as temporary:
        folder = Path(temporary)
        project(folder, count)
        size = (folder / "rows.jsonl").stat().st_size
        figures: dict[str, Any] = {"rows": count, "mb": size / 1e6}
        for command in COMMANDS:
            figures[command] = apart("tests.bench.rows", command, str(folder))
            print(count, command, figures[command], flush=True)
    assert figures["prepare"]["kept"] == figures["check"]["kept"]  # the check's split is prepare's
    machine = hardware()
    versions = {name: locked_versions()[name] for name in ("transformers", "tokenizers", "pyarrow")}
    return figures | {"machine": f"{machine['cpu']}, {machine['cores']} cores", "versions": versions}


def page(sizes: list[dict[str, Any]]) -> str:
    """docs/results/rows.md."""
    lines: list[str] = []
    for figures in sizes:
        for command in COMMANDS:
            run = figures[command]
            above = run["peak_gib"] - run["before_gib"]
            name = "prepare" if command == "prepare" else "check --data"
            lines.append(
                f"| {figures['rows']:,} | {figures['mb']:,.0f} | {name} | {figures['rows'] / run['cpu_s']:,.0f} "
                f"| {figures['rows'] / run['s']:,.0f} | {run['s']:,.1f} | {above:.2f} | {run['peak_gib']:.2f} |"
            )
    phases = "\n".join(
        f"| {figures['rows']:,} | {' | '.join(f'{spent:,.1f}' for spent in figures['prepare']['phases'].values())} |"
        for figures in sizes
    )
    names = list(sizes[0]["prepare"]["phases"])
    tokens = sizes[-1]["prepare"]["tokens"] / sum(sizes[-1]["prepare"]["kept"].values())
    versions = ", ".join(f"{name} {version}" for name, version in sizes[-1]["versions"].items())
    return f"""<!-- Written by `python -m tests.bench.rows`. -->
# Rows of any number

What `prepare` and `quench check --data` cost by the number of rows: generated ones (seed {SEED}) of one question and
one answer, {tokens:.0f} tokens on average with the quickstart's tokenizer and template. n = 1 run a size, one thread,
a process of its own for each. Near-duplicates and leaks are looked for, as by default.
Goals of prepare: {GOAL_ROWS_S:,} rows a second and core; at most {GOAL_GIB:g} GiB above the process with its tokenizer
open.

| rows | MB | command | rows a CPU second | rows a second | seconds | GiB above the start | peak RSS, GiB |
| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

A CPU second is one of this process on one core, whatever else the machine does; `seconds` are by the clock.

Where the seconds of prepare go:

| rows | {" | ".join(names)} |
| ---: | {" | ".join("---:" for _ in names)} |
{phases}

{"; ".join(dict.fromkeys(figures["machine"] for figures in sizes))}; {versions}.
"""


def main() -> None:
    """Measure what is not measured yet, write the page after each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, help="measure this size, also where it is measured already")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows.json and rows.md")
    parser.add_argument("--child", nargs=2, metavar=("COMMAND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        command, folder = options.child
        figures = COMMANDS[command](Path(folder), Path(folder) / command)
        print(json.dumps(figures | {"peak_gib": peak_kib() / (1 << 20)}))
        return
    record = options.out / "rows.json"
    done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for count in [options.rows] if options.rows else [size for size in SIZES if str(size) not in done]:
        done[str(count)] = measure(count)
        record.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        (options.out / "rows.md").write_text(page([done[key] for key in sorted(done, key=int)]), encoding="utf-8")
    print(f"wrote {options.out / 'rows.md'}")


if __name__ == "__main__":
    main()
