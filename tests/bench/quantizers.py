"""`make bench`: each backend through Quench's quantize job against the bare library call; docs/results/quantizers.md.

Both are processes of their own on one thread, started in turns: ours as a run starts it (tasks.runtime.child), the
other a script of what one writes by hand, with the same rows and settings and the same environment variables. Both
leave without interpreter shutdown. Times are of whole processes, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes.slugs import parse_scheme
from tasks.quantize import alone
from tasks.runtime.environments import locked_versions
from tasks.runtime.job import Job
from tasks.runtime.launch import CHECKOUT, child_env
from tasks.runtime.step import hardware
from tests.jobs.build import make_job

RESULTS = CHECKOUT / "docs" / "results" / "quantizers.md"
BASE = CHECKOUT / "recipes" / "quickstart" / "base"
DATA = CHECKOUT / "recipes" / "quickstart" / "data" / "sql.jsonl"
SLUGS = ("gptq-w4-g128", "awq-w4-g128", "nf4", "int8", "rtn-w4-g128")
ROWS = 256
GOAL = 1.02


class Run(NamedTuple):
    """One process. `record_s`: of ours, after the library call: reload, comparison, checks, companions."""

    seconds: float
    peak_gib: float
    record_s: float


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Seconds of what every process pays once, on this machine: medians of three processes."""

    start: float
    torch: float
    transformers: float
    gptqmodel: float
    bitsandbytes: float
    ours: float


def bare(slug: str, calibset: Path, out: Path) -> None:
    """The library call alone, with the rows that ours gives it."""
    import torch

    torch.set_num_threads(1)
    if slug in ("nf4", "int8"):
        _bare_bitsandbytes(slug, out)
        return
    from tasks.jobs.backends.environment import tame_gptqmodel

    tame_gptqmodel()  # else it would first compile an extension for 31 s, or not start on two cores
    import pyarrow.parquet as pq
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import AWQConfig, GPTQConfig, RTNConfig

    os.chdir(out)
    rows = pq.read_table(calibset / "calibset.parquet")["input_ids"].to_pylist()
    if slug.startswith("awq"):
        stream = [token for row in rows for token in row]
        length = len(stream) // len(rows)
        rows = [stream[i * length : (i + 1) * length] for i in range(len(rows))]
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    common = {"bits": 4, "group_size": 128, "offload_to_disk": False}
    if slug.startswith("rtn"):
        model = GPTQModel.load(str(BASE), RTNConfig(**common), device="cpu")
        model.quantize(None)
    elif slug.startswith("awq"):
        model = GPTQModel.load(str(BASE), AWQConfig(**common, sym=False), device="cpu")
        model.quantize(samples, batch_size=1, backend=BACKEND.AWQ_TORCH)
    else:
        model = GPTQModel.load(str(BASE), GPTQConfig(**common, damp_percent=0.05), device="cpu")
        model.quantize(samples, batch_size=1)
    model.save(str(out))


def _bare_bitsandbytes(slug: str, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4) if slug == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        BASE, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(out)


def timed(argv: list[str], *, log: Path) -> float:
    """Seconds of a process, from its start to its end."""
    with log.open("w", encoding="utf-8") as file:
        clock = time.perf_counter()
        code = subprocess.call(argv, cwd=CHECKOUT, env=child_env(threads=1), stdout=file, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - clock
    if code:
        raise SystemExit(f"{argv}\n{log.read_text(encoding='utf-8')}")
    return seconds


def ours(slug: str, calibset: Path, work: Path) -> Run:
    """The quantize job in the child process of a run."""
    scheme = parse_scheme(slug)
    inputs = {"model": BASE} | ({"calibset": calibset} if scheme.needs_calibration else {})
    job = make_job("quantize", work / "out", params=alone(slug, scheme, inputs={}).params, **inputs)
    seconds, result = run(job, work)
    return Run(seconds, result["peak_rss_gib"], result["record_s"])


class Finished(NamedTuple):
    """Seconds of a child process, and what it answered."""

    seconds: float
    result: dict[str, Any]


def run(job: Job, work: Path) -> Finished:
    """A job as a run starts it. This process stays small: a child's peak RSS begins with its parent's."""
    job.dump(work / "job.json")
    argv = [sys.executable, "-P", "-m", "tasks.runtime.child", "run", str(work / "job.json")]
    seconds = timed(argv, log=work / "log")
    answer = json.loads((work / "result.json").read_text(encoding="utf-8"))
    return Finished(seconds, {**answer["result"], "peak_rss_gib": answer["peak_rss_gib"]})


def theirs(slug: str, calibset: Path, work: Path) -> Run:
    """The bare call in a process of its own."""
    (work / "out").mkdir()
    words = ["bare", "--slug", slug, "--calibset", str(calibset), "--out", str(work / "out")]
    seconds = timed([sys.executable, "-m", "tests.bench.quantizers", *words], log=work / "log")
    return Run(seconds, float((work / "out" / "peak").read_text()), 0.0)


def pairs_of(slug: str, calibset: Path, *, pairs: int | None) -> list[tuple[Run, Run]]:
    """Interleaved pairs (ours, bare), each pair in the other order than the one before."""
    done: list[tuple[Run, Run]] = []
    while len(done) < (pairs or (7 if not done or done[0][1].seconds < 60 else 3)):
        made: dict[str, Run] = {}
        for name in ("ours", "bare") if len(done) % 2 == 0 else ("bare", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                made[name] = (ours if name == "ours" else theirs)(slug, calibset, Path(folder))
        done.append((made["ours"], made["bare"]))
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
        start = statistics.median(timed([sys.executable, "-c", "pass"], log=Path(folder) / "log") for _ in range(3))
    models = "from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel"
    tame = "from tasks.jobs.backends.environment import tame_gptqmodel\ntame_gptqmodel()"
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


def table(measured: dict[str, list[tuple[Run, Run]]]) -> str:
    """A row a scheme."""
    lines = [
        "| scheme | pairs | bare, s | ours, s | of it record | time | time but for record | peak RSS, GiB | peak RSS |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for slug, pairs in measured.items():
        median = {
            "bare": statistics.median(bare.seconds for _, bare in pairs),
            "ours": statistics.median(own.seconds for own, _ in pairs),
            "record": statistics.median(own.record_s for own, _ in pairs),
            "peak": statistics.median(own.peak_gib for own, _ in pairs),
        }
        cells = [
            f"{slug} | {len(pairs)} | {median['bare']:.2f} | {median['ours']:.2f} | {median['record']:.2f}",
            interval([own.seconds / bare.seconds for own, bare in pairs]),
            interval([(own.seconds - own.record_s) / bare.seconds for own, bare in pairs]),
            f"{median['peak']:.2f}",
            interval([own.peak_gib / bare.peak_gib for own, bare in pairs]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(measured: dict[str, list[tuple[Run, Run]]], costs: Fixed, *, sequences: int, tokens: int) -> str:
    """docs/results/quantizers.md."""
    machine, versions = hardware(), locked_versions()
    tools = ("torch", "transformers", "gptqmodel", "bitsandbytes")
    once = "\n".join(f"| {name} | {seconds:.2f} |" for name, seconds in asdict(costs).items())
    return f"""<!-- Written by `make bench`. -->
# Quantizers, measured

The quickstart's base (5.8 M parameters, 42 linear layers), {ROWS} rows packed into {sequences} sequences, {tokens}
tokens. Each backend through Quench's quantize job, as a run starts it, against the library call alone; both are
processes of their own on one thread, imports included, started in turns. Ratios are ours / bare: medians of pairs with
95 % bootstrap intervals; goal: at most {GOAL}. Same rows, settings and environment variables: without the variables
GPTQModel compiles an extension for 31 s first. RTN is our own code; bare is GPTQModel's RTN.

{table(measured)}

*Record* is what the library does not do: the written folder is loaded again beside the bf16 model and each attention
and FFN compared (schemes with calibration), stored floats are checked for inf and NaN, companions copied. It takes two
loads and two forward passes of 512 tokens, whatever the number of calibration rows.

## Paid once by every process, seconds

| what | s |
| --- | ---: |
{once}

`start` is an empty interpreter; each import is behind those above it; `ours` is tasks.jobs.quantize behind torch and
transformers. The bare call pays all but `ours`.

{machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB;
{", ".join(f"{name} {versions[name]}" for name in tools)}.
"""


def main(slugs: list[str], *, pairs: int | None, out: Path) -> None:
    """Measure and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        params: dict[str, Any] = {
            "rows": ROWS,
            "seq_len": 512,
            "seed": 0,
            "stratify": "proportional",
            "min_tokens": 0,
            "max_near_duplicates": 0.0,
        }
        data = Path(folder) / "rows.jsonl"
        data.write_text("\n".join(DATA.read_text(encoding="utf-8").splitlines()[:1000]) + "\n", encoding="utf-8")
        paths = {"rows": data, "tokenizer": BASE}
        job = replace(
            make_job("calibrate", Path(folder) / "calibset", params=params, **paths),
            entry="tasks.jobs.calibrate_rows:run",
        )
        made = run(job, Path(folder))[1]
        measured = {slug: pairs_of(slug, job.out, pairs=pairs) for slug in slugs}
    out.write_text(page(measured, fixed(), sequences=made["sequences"], tokens=made["tokens"]), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("bare",))
    parser.add_argument("--slug", action="append")
    parser.add_argument("--pairs", type=int, help="default: 7, or 3 where a call takes a minute")
    parser.add_argument("--calibset", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.part == "bare":
        bare(args.slug[0], args.calibset, args.out)
        (args.out / "peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)))
        sys.stdout.flush()
        os._exit(0)
    main(args.slug or list(SLUGS), pairs=args.pairs, out=args.out)
