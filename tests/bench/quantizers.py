"""`make bench`: each backend through Quench's quantize job against the bare library call; docs/results/quantizers.md.

Both are processes of their own on one thread, started in turns: ours as a run starts it (tasks.runtime.process.child),
the other a script of what one writes by hand (tests/bench/bare.py), with the same rows and settings and the same
environment variables, in the same Python environment. Both leave without interpreter shutdown. Times are of whole
processes, imports included. Every pair is kept in docs/results/quantizers.json, so that one scheme can be measured
again without the others.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from recipes.schemes.scheme import Scheme
from recipes.schemes.slugs import by_backend, parse_scheme
from tasks.jobs.loading.environment import GPTQMODEL
from tasks.quantize import ENVIRONMENTS, alone
from tasks.runtime.process.environments import environment_problem, interpreter, locked_versions
from tasks.runtime.process.job import Job
from tasks.runtime.process.launch import CHECKOUT, child_env
from tasks.runtime.step import hardware
from tests.jobs.build import make_job

RESULTS = CHECKOUT / "docs" / "results" / "quantizers.md"
BASE = CHECKOUT / "recipes" / "quickstart" / "base"
DATA = CHECKOUT / "recipes" / "quickstart" / "data" / "sql.jsonl"
SLUGS = (
    *("gptq-w4-g128", "awq-w4-g128", "nf4", "int8", "rtn-w4-g128", "ct-gptq-w4-g128", "ct-awq-w4-g128"),
    *("gptq-w4-g128.auto-gptq", "awq-w4-g128.autoawq"),
)
ROWS = 256
# Their calls take minutes; fewer rows make the comparison a harder one, since what Quench adds does not grow with them.
FEWER = {"awq-w4-g128": 64, "ct-awq-w4-g128": 64, "awq-w4-g128.autoawq": 64}
GOAL = 1.02


class Run(NamedTuple):
    """One process.

    Attributes:
        seconds: From its start to its end.
        cpu_s: Seconds of CPU that it took, user and system: what a busy machine changes least.
        peak_gib: Peak RSS.
        record_s: Of ours, after the library call: reload, comparison, checks, companions.
    """

    seconds: float
    cpu_s: float
    peak_gib: float
    record_s: float


class Pair(NamedTuple):
    """Ours and the bare call, one right after the other; the machine's load average (1 min) before them."""

    ours: Run
    bare: Run
    load: float


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Seconds of what every process pays once, on this machine: medians of three processes."""

    start: float
    torch: float
    transformers: float
    gptqmodel: float
    bitsandbytes: float
    ours: float


class Rows(NamedTuple):
    """The calibration set: as ours reads it, and as the bare script does."""

    calibset: Path
    ids: Path
    tokens: int


class Measured(NamedTuple):
    """A scheme's pairs, and the calibration set that they had."""

    rows: int
    tokens: int
    pairs: list[Pair]


def scheme_of(slug: str) -> Scheme:
    """A scheme by its slug, whose last part may name a backend."""
    plain, _, backend = slug.partition(".")
    return by_backend(parse_scheme(plain), backend) if backend else parse_scheme(plain)


class Took(NamedTuple):
    """Of a process: seconds from its start to its end, and of CPU."""

    seconds: float
    cpu_s: float


def timed(argv: list[str], *, log: Path, more: dict[str, str] | None = None) -> Took:
    """Run a process to its end."""
    env = child_env(threads=1) | (more or {})
    with log.open("w", encoding="utf-8") as file:
        clock = time.perf_counter()
        child = subprocess.Popen(argv, cwd=CHECKOUT, env=env, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - clock
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{argv}\n{log.read_text(encoding='utf-8')}")
    return Took(seconds, used.ru_utime + used.ru_stime)


def ours(slug: str, rows: Rows, work: Path) -> Run:
    """The quantize job in the child process of a run."""
    scheme = scheme_of(slug)
    inputs = {"model": BASE} | ({"calibset": rows.calibset} if scheme.needs_calibration else {})
    job = make_job("quantize", work / "out", params=alone(slug, scheme, inputs={}).params, **inputs)
    took, result = run(job, work, environment=ENVIRONMENTS.get(scheme.backend))
    return Run(*took, result["peak_rss_gib"], result["record_s"])


class Finished(NamedTuple):
    """What a child process took, and what it answered."""

    took: Took
    result: dict[str, Any]


def run(job: Job, work: Path, *, environment: str | None = None) -> Finished:
    """A job as a run starts it. This process stays small: a child's peak RSS begins with its parent's."""
    job.dump(work / "job.json")
    argv = [str(interpreter(environment)), "-P", "-m", "tasks.runtime.process.child", "run", str(work / "job.json")]
    took = timed(argv, log=work / "log")
    answer = json.loads((work / "result.json").read_text(encoding="utf-8"))
    return Finished(took, {**answer["result"], "peak_rss_gib": answer["peak_rss_gib"]})


def theirs(slug: str, rows: Rows, work: Path) -> Run:
    """The bare call in a process of its own."""
    scheme, out, peak = scheme_of(slug), work / "out", work / "peak"
    out.mkdir()
    python = str(interpreter(ENVIRONMENTS.get(scheme.backend)))
    words = [slug, str(BASE), str(rows.ids), str(out), str(peak)]
    took = timed([python, "-P", "tests/bench/bare.py", *words], log=work / "log", more=GPTQMODEL)
    return Run(*took, float(peak.read_text(encoding="utf-8")), 0.0)


def pairs_of(slug: str, rows: Rows, *, pairs: int | None) -> list[Pair]:
    """Interleaved pairs, each in the other order than the one before."""
    done: list[Pair] = []
    while len(done) < (pairs or (7 if not done or done[0].bare.seconds < 60 else 3)):
        made: dict[str, Run] = {}
        load = os.getloadavg()[0]
        for name in ("ours", "bare") if len(done) % 2 == 0 else ("bare", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                made[name] = (ours if name == "ours" else theirs)(slug, rows, Path(folder))
        done.append(Pair(made["ours"], made["bare"], round(load, 1)))
        print(slug, *done[-1], flush=True)
    return done


def fixed() -> Fixed:
    """Each import in a process of its own, behind those that it needs anyway."""

    def seconds(before: str, what: str) -> float:
        code = f"{before}\nimport time\nclock = time.perf_counter()\n{what}\nprint(time.perf_counter() - clock)"
        argv = [sys.executable, "-c", f"import os\n{code}\nimport sys; sys.stdout.flush(); os._exit(0)"]
        took = []
        for _ in range(3):
            done = subprocess.run(
                argv, cwd=CHECKOUT, env=child_env(threads=1), capture_output=True, text=True, check=True
            )
            took.append(float(done.stdout.splitlines()[-1]))
        return statistics.median(took)

    with tempfile.TemporaryDirectory() as folder:
        start = statistics.median(
            timed([sys.executable, "-c", "pass"], log=Path(folder) / "log").seconds for _ in range(3)
        )
    models = "from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel"
    tame = "from tasks.jobs.loading.environment import tame_gptqmodel\ntame_gptqmodel()"
    return Fixed(
        start=start,
        torch=seconds("", "import torch"),
        transformers=seconds("import torch", models),
        gptqmodel=seconds(f"import torch\n{models}\n{tame}", "import gptqmodel"),
        bitsandbytes=seconds(f"import torch\n{models}", "import bitsandbytes"),
        ours=seconds(f"import torch\n{models}", "import tasks.jobs.quantize"),
    )


def interval(ratios: list[float]) -> str:
    """Median with its 95 % percentile bootstrap interval, 10,000 draws."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def table(measured: dict[str, Measured]) -> str:
    """A row a scheme."""
    lines = [
        "| scheme | tokens | pairs | load | bare, s | ours, s | of it record | time | CPU time "
        "| CPU time but for record | peak RSS, GiB | peak RSS |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for slug in sorted(measured, key=SLUGS.index):
        _, tokens, pairs = measured[slug]
        median = {
            "load": statistics.median(pair.load for pair in pairs),
            "bare": statistics.median(pair.bare.seconds for pair in pairs),
            "ours": statistics.median(pair.ours.seconds for pair in pairs),
            "record": statistics.median(pair.ours.record_s for pair in pairs),
            "peak": statistics.median(pair.ours.peak_gib for pair in pairs),
        }
        cells = [
            f"{slug} | {tokens if scheme_of(slug).needs_calibration else ''} | {len(pairs)} | {median['load']:.1f}",
            f"{median['bare']:.2f} | {median['ours']:.2f}",
            f"{median['record']:.2f}",
            interval([pair.ours.seconds / pair.bare.seconds for pair in pairs]),
            interval([pair.ours.cpu_s / pair.bare.cpu_s for pair in pairs]),
            interval([_own_cpu(pair.ours) / pair.bare.cpu_s for pair in pairs]),
            f"{median['peak']:.2f}",
            interval([pair.ours.peak_gib / pair.bare.peak_gib for pair in pairs]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _own_cpu(run: Run) -> float:
    """CPU seconds but for the record's, which takes its part of them as it does of the time."""
    return run.cpu_s * (1 - run.record_s / run.seconds)


def versions(slugs: list[str]) -> str:
    """Of what was measured, by environment."""
    found: dict[str, str] = {}
    for slug in sorted(slugs, key=SLUGS.index):
        scheme = scheme_of(slug)
        environment = ENVIRONMENTS.get(scheme.backend)
        locked = locked_versions(environment)
        tools = alone(slug, scheme, inputs={}).tools
        found |= {f"{tool} {locked[tool]}": environment or "main" for tool in tools}
    return ", ".join(found)


def page(measured: dict[str, Measured], costs: dict[str, float]) -> str:
    """docs/results/quantizers.md."""
    machine = hardware()
    fewer = ", ".join(f"{rows} for {slug}" for slug, rows in FEWER.items())
    once = "\n".join(f"| {name} | {seconds:.2f} |" for name, seconds in costs.items())
    return f"""<!-- Written by `make bench` from quantizers.json. -->
# Quantizers, measured

The quickstart's base (5.8 M parameters, 42 linear layers), {ROWS} rows of its data, {fewer}.
Each backend through Quench's quantize job, as a run starts it, against the library call alone (tests/bench/bare.py,
which imports nothing of Quench's); both are processes of their own on one thread, in the same Python environment,
imports included, started alternately. Ratios are ours / bare: medians of pairs with 95 % bootstrap intervals; goal: at
most {GOAL}. Same rows, settings and environment variables: without the variables GPTQModel compiles an extension for
31 s first. RTN is our own code; bare is GPTQModel's RTN.

{table(measured)}

*Load* is the machine's load average before a pair, the median. Above 1 other programs ran: on the other core (taskset)
beside most rows, at a lower priority on the same cores beside the two archived backends. There seconds and time ratios
say little. Read those of CPU time, and measure again on a quiet machine before you decide by them.

*Record* is what the library does not do: the written folder is loaded again beside the bf16 model and each attention
and FFN compared (schemes with calibration, but for the archived backends), stored floats are checked for inf and NaN,
companions copied. It takes two loads and two forward passes of 512 tokens, whatever the number of calibration rows.
RTN, NF4 and int8 see no rows; the same look at their outputs would add a quarter to RTN's step and a fifth to theirs,
so their record is of weights alone.

## Paid once by every process, seconds

| what | s |
| --- | ---: |
{once}

`start` is an empty interpreter; each import is behind those above it; `ours` is tasks.jobs.quantize behind torch and
transformers. The bare call pays all but `ours`.

{machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB;
{versions(list(measured))}.
"""


def calibrated(folder: Path, rows: int) -> Rows:
    """A calibration set of so many rows, made by the job of a run."""
    folder.mkdir()
    params: dict[str, Any] = {
        "rows": rows,
        "seq_len": 512,
        "seed": 0,
        "stratify": "proportional",
        "min_tokens": 0,
        "max_near_duplicates": 0.0,
    }
    data, ids = folder / "rows.jsonl", folder / "ids.json"
    data.write_text("\n".join(DATA.read_text(encoding="utf-8").splitlines()[:1000]) + "\n", encoding="utf-8")
    job = replace(
        make_job("calibrate", folder / "calibset", params=params, rows=data, tokenizer=BASE),
        entry="tasks.jobs.calibration.user_rows:run",
    )
    made = run(job, folder).result
    stored = pq.read_table(job.out / "calibset.parquet", columns=["input_ids"])["input_ids"].to_pylist()
    ids.write_text(json.dumps(stored), encoding="utf-8")
    return Rows(job.out, ids, made["tokens"])


def kept(path: Path) -> dict[str, Any]:
    """What was measured before, by scheme, and fixed costs."""
    if not path.exists():
        return {"schemes": {}}
    read = json.loads(path.read_text(encoding="utf-8"))
    schemes = {
        slug: Measured(rows, tokens, [Pair(Run(*own), Run(*bare), load) for own, bare, load in pairs])
        for slug, (rows, tokens, pairs) in read["schemes"].items()
    }
    return {**read, "schemes": schemes}


def main(slugs: list[str], *, pairs: int | None, add: bool, out: Path) -> None:
    """Measure, keep what was measured, and write the page.

    Args:
        slugs: What to measure.
        pairs: How many; default: 7, or 3 where a call takes a minute.
        add: Keep a scheme's earlier pairs beside the new ones.
        out: The page; the pairs are kept beside it.
    """
    raw = out.with_suffix(".json")
    with tempfile.TemporaryDirectory() as folder:
        for slug in slugs:
            if problem := environment_problem(ENVIRONMENTS.get(scheme_of(slug).backend)):
                print(f"{slug} is left out: {problem.what} {problem.next}")
                continue
            number = FEWER.get(slug, ROWS)
            rows = calibrated(Path(folder) / slug, number)
            found = pairs_of(slug, rows, pairs=pairs)
            known = kept(raw)
            before = known["schemes"][slug].pairs if add else []
            known["schemes"][slug] = Measured(number, rows.tokens, [*before, *found])
            raw.write_text(json.dumps(known, sort_keys=True) + "\n", encoding="utf-8")
        known = kept(raw)
        if "fixed" not in known or slugs == list(SLUGS):
            known["fixed"] = asdict(fixed())
            raw.write_text(json.dumps(known, sort_keys=True) + "\n", encoding="utf-8")
    out.write_text(page(known["schemes"], known["fixed"]), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slug", action="append", choices=SLUGS)
    parser.add_argument("--pairs", type=int, help="default: 7, or 3 where a call takes a minute")
    parser.add_argument("--add", action="store_true", help="keep a scheme's earlier pairs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    main(args.slug or list(SLUGS), pairs=args.pairs, add=args.add, out=args.out)
