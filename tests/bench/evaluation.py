"""`make bench`: what evaluating arms costs over bare forward passes; writes docs/results/evaluation.md.

Arms of a finished quickstart run, each scored again from its own job.json by the child process that a run starts, and
by a script of what one writes by hand: load, forward the same batches, decode the same prompts greedily, keep nothing.
Both are processes of their own on one thread, started in turns.

    python -m tests.bench.evaluation [--home FOLDER] [--pairs N] [--arm SLUG ...] [--out FILE] [--render]

Figures are kept in docs/results/evaluation.json after each pair; `--render` writes the page from them alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.job import Job
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import hardware
from tasks.runtime.store.local import find_home
from tests.bench.quantizers import Took, interval, timed

RESULTS = CHECKOUT / "docs" / "results" / "evaluation.md"
ARMS = ("base", "nf4-adapter", "merged-dequantized", "gptq-w4-g128", "gptq-w4-g128.on-base")
ANSWERS = "\n## Answers\n"  # begins the section that tests/bench/decoding.py writes
PAIRS = 7
GOAL = 1.15
OURS, BARE = 0, 1  # of a pair
PARTS = ("load", "forward", "decode")
TOOLS = ("torch", "transformers", "peft", "gptqmodel", "bitsandbytes")


class Spent(NamedTuple):
    """Of one process: seconds on the clock and of the CPU; the parts, on the clock, are of the bare script alone."""

    seconds: float
    cpu_s: float
    load: float = 0.0
    forward: float = 0.0
    decode: float = 0.0


class Start(NamedTuple):
    """From the start of a process to the end of its first imports."""

    bare: Took
    ours: Took


Pair = dict[str, tuple[Spent, Spent]]  # slug -> ours, bare


class Measured(NamedTuple):
    """All figures of the page."""

    start: Start
    pairs: list[Pair]
    rows: dict[str, int]
    machine: dict[str, Any]
    versions: dict[str, str]


# ---- what one writes by hand


def bare(job: Job) -> Spent:
    """Load, forward over dev, test and general text, decode the prompts that the arm's evaluation decodes."""
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    torch.set_num_threads(1)
    clock = time.perf_counter()
    model = _loaded(job)
    load = time.perf_counter() - clock

    data, size = job.inputs["dataset"].path, job.params["batch_size"]
    splits = ["dev", "test"]
    rows = pq.read_table(data / "rows.parquet", filters=[("split", "in", splits)]).to_pylist()
    texts = [row["input_ids"] for row in rows], pq.read_table(data / "general.parquet")["input_ids"].to_pylist()
    clock = time.perf_counter()
    with torch.inference_mode():
        for ids in texts:
            for batch in _batches(ids, size, longest=len):
                padded, mask = _padded(batch, left=False)
                model(input_ids=padded, attention_mask=mask, use_cache=False)
    forward = time.perf_counter() - clock

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    stored = GenerationConfig.from_pretrained(data / "tokenizer")
    greedy = GenerationConfig(
        max_new_tokens=job.params["max_new_tokens"],
        do_sample=False,
        eos_token_id=stored.eos_token_id,
        pad_token_id=stored.pad_token_id,
    )
    model.generation_config = greedy
    splits = job.params.get("decoded", splits)
    clock = time.perf_counter()
    with torch.inference_mode():
        for split in splits:
            of_split = [row for row in rows if row["split"] == split]
            for batch in _batches(of_split, size, longest=lambda row: len(row["input_ids"]) - len(row["prompt_ids"])):
                padded, mask = _padded([row["prompt_ids"] for row in batch], left=True)
                made = model.generate(input_ids=padded, attention_mask=mask, generation_config=greedy)
                tokenizer.batch_decode(made[:, padded.shape[1] :], skip_special_tokens=True)
    return Spent(0.0, 0.0, load, forward, time.perf_counter() - clock)


def _loaded(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    if job.params["kind"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if job.params["kind"] == "quantized":
        from tasks.jobs.loading.environment import tame_gptqmodel

        tame_gptqmodel()  # else importing GPTQModel compiles an extension for 31 s
    model: Any = AutoModelForCausalLM.from_pretrained(job.inputs["model"].path, **options)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # as ours: that kernel rounds the scales, which is another model
    if "adapter" in job.inputs:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job.inputs["adapter"].path)
    return model.eval()


def _batches(rows: list[Any], size: int, *, longest: Any) -> list[list[Any]]:
    ordered = sorted(rows, key=longest, reverse=True)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _padded(rows: list[list[int]], *, left: bool) -> Any:
    import torch

    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    return ids, mask


# ---- the pairs


def jobs_of(home: Path, arms: list[str]) -> dict[str, Job]:
    """The evaluate jobs of the latest run's arms, as the run wrote them."""
    steps = json.loads((home / "runs" / "latest" / "steps.json").read_text(encoding="utf-8"))["steps"]
    paths = {one["slug"]: one["path"] for one in steps if one["stage"] == "evaluate" and one["path"]}
    found: dict[str, Job] = {}
    for slug in arms:
        if slug not in paths:
            raise SystemExit(f"{slug}: not evaluated in {home / 'runs' / 'latest'}; run `make quickstart` first")
        last = sorted((home / paths[slug]).glob("attempt-*/job.json"))[-1]
        found[slug] = Job.load(last)
    return found


def once(job: Job, *, ours: bool) -> Spent:
    """One process from its start to its end, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        replace(job, out=folder / "files", execution=replace(job.execution, threads=1)).dump(folder / "job.json")
        if ours:
            argv = [sys.executable, "-P", "-m", "tasks.runtime.process.child", "run", str(folder / "job.json")]
            return Spent(*timed(argv, log=folder / "log"))
        argv = [sys.executable, "-m", "tests.bench.evaluation", "--bare", str(folder / "job.json")]
        taken = timed(argv, log=folder / "log")
        return Spent(*taken, *json.loads((folder / "files" / "spent.json").read_text())[2:])


def start() -> Start:
    """Medians of three processes that only import, behind what `timed` sees of every process."""
    imports = {
        "bare": "import tests.bench.evaluation, pyarrow.parquet, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig",
        "ours": "import tasks.runtime.process.child, tasks.jobs.evaluate",
    }
    with tempfile.TemporaryDirectory() as folder:
        argv = {name: [sys.executable, "-c", f"{code}\nimport os; os._exit(0)"] for name, code in imports.items()}
        took = {name: [timed(line, log=Path(folder) / "log") for _ in range(3)] for name, line in argv.items()}
    return Start(
        **{
            name: Took(*(statistics.median(column) for column in zip(*all_, strict=True)))
            for name, all_ in took.items()
        }
    )


def pairs_of(jobs: Mapping[str, Job], *, pairs: int) -> Iterator[Pair]:
    """All arms a pair; ours and bare in turns, the first of the two changing from pair to pair."""
    for number in range(pairs):
        pair: Pair = {}
        for slug, job in jobs.items():
            made = {ours: once(job, ours=ours) for ours in ((True, False) if number % 2 == 0 else (False, True))}
            pair[slug] = (made[True], made[False])
            print(number, slug, *pair[slug], flush=True)
        yield pair


# ---- the page


def table(measured: Measured) -> str:
    """A row an arm and one for all of them."""
    lines = [
        "| arm | bare, s | of it load | forward | decode | ours, s | ours / bare, CPU | on the clock | whole, CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    slugs = list(measured.pairs[0])
    for name, members in [*((slug, [slug]) for slug in slugs), (f"**{len(slugs)} arms**", slugs)]:

        def of(side: int, field: str, members: list[str] = members) -> list[float]:
            return [sum(getattr(pair[slug][side], field) for slug in members) for pair in measured.pairs]

        def without_start(side: int, field: str, members: list[str] = members) -> list[float]:
            paid = getattr((measured.start.ours, measured.start.bare)[side], field)
            return [seconds - len(members) * paid for seconds in of(side, field)]

        def ratio(ours: list[float], bare: list[float]) -> str:
            return interval([a / b for a, b in zip(ours, bare, strict=True)])

        columns = [without_start(BARE, "cpu_s"), *(of(BARE, part) for part in PARTS), without_start(OURS, "cpu_s")]
        figures = " | ".join(f"{statistics.median(column):.2f}" for column in columns)
        inner, clock = (ratio(without_start(OURS, field), without_start(BARE, field)) for field in ("cpu_s", "seconds"))
        lines.append(f"| {name} | {figures} | {inner} | {clock} | {ratio(of(OURS, 'cpu_s'), of(BARE, 'cpu_s'))} |")
    return "\n".join(lines)


def page(measured: Measured) -> str:
    """docs/results/evaluation.md."""
    machine, rows, once_paid = measured.machine, measured.rows, measured.start
    return f"""<!-- Written by `make bench`. -->
# Evaluation, measured

Arms of the quickstart ({rows["dev"]} rows of dev, {rows["test"]} of test, {rows["general"]} general texts)
through Quench's evaluate job, as a run starts it, against a script as one writes it by hand: load the model, forward
the same batches and throw the logits away, decode the same prompts greedily. Ours also computes losses, KL to the
reference over the full vocabulary, agreement and task scores, and writes them. Both are processes of their own on one
thread, started alternately; the NF4 model has the same kernel in both. {len(measured.pairs)} pairs; ratios are medians
with 95 % bootstrap intervals. Goal: all arms at most {GOAL} times the bare time, the start of processes apart.

{table(measured)}

*bare* and *ours* are seconds of CPU without the start of a process (interpreter and first imports: bare
{once_paid.bare.cpu_s:.2f} s, ours {once_paid.ours.cpu_s:.2f} s, paid once per arm); load, forward and decode are
on the clock. Other programs ran on the machine, and they change CPU time least. *Whole* has the start in
both.

{conditions_text(machine, measured.versions)}
"""


def conditions_text(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The machine, and what ran."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB;\n{named}."


def conditions(jobs: Mapping[str, Job]) -> dict[str, Any]:
    """What stands beside the figures."""
    import pyarrow.parquet as pq

    data = next(iter(jobs.values())).inputs["dataset"].path
    splits = pq.read_table(data / "rows.parquet", columns=["split"])["split"].to_pylist()
    rows = {"dev": splits.count("dev"), "test": splits.count("test")}
    return {
        "rows": {**rows, "general": pq.read_metadata(data / "general.parquet").num_rows},
        "machine": hardware(),
        "versions": {name: locked_versions()[name] for name in TOOLS},
    }


def save(out: Path, measured: Measured) -> None:
    """The figures beside the page, and the page."""
    pairs = [{slug: [one._asdict() for one in both] for slug, both in pair.items()} for pair in measured.pairs]
    raw = {
        **measured._asdict(),
        "start": {name: one._asdict() for name, one in measured.start._asdict().items()},
        "pairs": pairs,
    }
    out.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    _, heading, answers = out.read_text(encoding="utf-8").partition(ANSWERS) if out.is_file() else ("", "", "")
    out.write_text(page(measured) + heading + answers, encoding="utf-8")


def saved(out: Path) -> Measured:
    """The figures that are there."""
    raw = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return Measured(
        start=Start(**{name: Took(**one) for name, one in raw.pop("start").items()}),
        pairs=[
            {slug: (Spent(**both[0]), Spent(**both[1])) for slug, both in pair.items()} for pair in raw.pop("pairs")
        ],
        **raw,
    )


def main() -> None:
    """Measure and write the page, or be the bare process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bare", type=Path, help="job.json: be the process that is measured")
    parser.add_argument("--home", type=Path, help="where the quickstart has run; default: QUENCH_HOME")
    parser.add_argument("--arm", action="append")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.bare:
        job = Job.load(args.bare)
        (job.out / "spent.json").write_text(json.dumps(bare(job)))
        sys.stdout.flush()
        os._exit(0)  # as the child does: interpreter shutdown with torch loaded costs seconds
    if args.render:
        save(args.out, saved(args.out))
        return
    jobs = jobs_of(args.home or find_home(), args.arm or list(ARMS))
    measured = Measured(start(), [], **conditions(jobs))
    for pair in pairs_of(jobs, pairs=args.pairs):
        measured.pairs.append(pair)
        save(args.out, measured)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
