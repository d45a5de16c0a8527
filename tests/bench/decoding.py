"""`make bench`: how many steps answers take, and what putting rows aside saves; docs/results/evaluation.md has it.

Answers of arms of a finished run to the rows of test, decoded twice in one process on one thread, in turns: each batch
to its end, and with what is left of a batch put aside (tasks/jobs/measuring/decoding.py).

    python -m tests.bench.decoding [--home FOLDER] [--pairs N] [--arm SLUG ...] [--out FILE] [--render]

Figures are kept in docs/results/decoding.json; of the page this section alone is written anew, by `--render` from them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tasks.runtime.process.job import Job
from tasks.runtime.store.local import find_home
from tests.bench import evaluation
from tests.bench.quantizers import interval

ARMS = ("base", "merged-dequantized", "rtn-w3-g128")
PAIRS = 5
FIGURES = "decoding.json"  # beside the page


class Decoding(NamedTuple):
    """Of all answers of an arm.

    Attributes:
        cpu_s: Seconds of the CPU.
        steps: Forward passes, each a token of every row of its batch.
        row_steps: Tokens that were decoded: those of rows that had ended, too.
        read: Tokens of prompts, and of answers that went on elsewhere, with padding.
        answers: Row -> its tokens.
    """

    cpu_s: float
    steps: int
    row_steps: int
    read: int
    answers: dict[str, tuple[list[int], bool]]


def decoded(job: Job, model: Any, *, left: float) -> Decoding:
    """Decode all answers to test once."""
    from tasks.jobs.measuring.decoding import Decoder, greedy_config
    from tasks.jobs.measuring.teacher_forcing import read_rows

    data = job.inputs["dataset"].path
    rows = [row for row in read_rows(data, "test") if row.prompt_ids]
    config = greedy_config(data / "tokenizer", max_new_tokens=job.params["max_new_tokens"])
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    clock = time.process_time()
    decoder = Decoder(model=model, config=config, size=job.params["batch_size"], left=left)
    answers = {row.row: (answer.tokens, answer.ended) for row, answer in decoder.answers(rows)}
    spent = time.process_time() - clock
    hook.remove()
    read = sum(rows * tokens for rows, tokens in shapes if tokens > 1)
    return Decoding(spent, len(shapes), sum(rows for rows, _ in shapes), read, answers)


def measured(job: Job, *, pairs: int) -> dict[str, Any]:
    """The figures of one arm."""
    import torch

    from tasks.jobs.loading.load import load_arm
    from tasks.jobs.measuring.decoding import LEFT
    from tasks.jobs.measuring.tiles import read_in_rows

    torch.set_num_threads(1)
    os.environ["GPTQ_TORCH_CACHE_WEIGHTS"] = "1"  # as in the evaluate job
    model = load_arm(job.params["kind"], job.inputs["model"].path, adapter=job.optional("adapter"), device="cpu")
    read_in_rows(model)
    ways = {"whole": 0.0, "aside": LEFT}
    first = {name: decoded(job, model, left=left) for name, left in ways.items()}  # caches are warm then
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(pairs):
        for name in list(ways) if number % 2 == 0 else list(reversed(ways)):
            taken[name].append(decoded(job, model, left=ways[name]).cpu_s)
    whole, aside = first["whole"], first["aside"]
    return {
        "rows": len(whole.answers),
        "needed": sum(len(tokens) + ended for tokens, ended in whole.answers.values()),
        "changed": sum(aside.answers[row] != answer for row, answer in whole.answers.items()),
        "cpu_s": taken,
        **{name: {**first[name]._asdict(), "answers": None} for name in ways},
    }


def section(found: Mapping[str, Any]) -> str:
    """The section of the page."""
    lines = [
        "| arm | tokens needed | decoded, whole | aside | steps, whole | aside | whole, s | aside / whole | changed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for slug, arm in found["arms"].items():
        taken = arm["cpu_s"]
        ratios = [a / b for a, b in zip(taken["aside"], taken["whole"], strict=True)]
        shown = [arm["needed"], *(arm[way][what] for what in ("row_steps", "steps") for way in ("whole", "aside"))]
        figures = " | ".join(f"{number:,}" for number in shown)
        seconds = f"{statistics.median(taken['whole']):.2f} | {interval(ratios)}"
        lines.append(f"| {slug} | {figures} | {seconds} | {arm['changed']} of {arm['rows']} |")
    table = "\n".join(lines)
    return f"""{evaluation.ANSWERS}
A batch decodes until its longest answer has ended; what of it has ended is decoded on, for nothing. So where at most an
eighth of a batch still runs, these rows are put aside, and go on with what is left of other batches
(`tasks/jobs/measuring/decoding.py`). Answers to test, batches of {found["batch_size"]}, at most
{found["max_new_tokens"]} tokens: *whole* batches, and with rows put *aside*. {found["pairs"]} pairs in one process on
one thread, in seconds of CPU; ratios are medians with 95 % bootstrap intervals. A step is a forward pass, prompts
included.

{table}

*Changed* are answers that are other ones with rows put aside: by noise of arithmetic, as with another batch size. A
model that answers like the data has little to gain, since rows share batches by the length of their reference answers.
The table above has the share of decoding in an evaluation. Arms that are not the quickstart's were added to its
`quantize.schemes`.

{evaluation.conditions_text(found["machine"], found["versions"])}
"""


def write(out: Path, found: Mapping[str, Any]) -> None:
    """The section in place of the one that is there."""
    page, _, _ = out.read_text(encoding="utf-8").partition(evaluation.ANSWERS)
    out.write_text(page + section(found), encoding="utf-8")


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="where the quickstart has run; default: QUENCH_HOME")
    parser.add_argument("--arm", action="append")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=evaluation.RESULTS)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.render:
        write(args.out, json.loads((args.out.parent / FIGURES).read_text(encoding="utf-8")))
        return
    jobs = evaluation.jobs_of(args.home or find_home(), args.arm or list(ARMS))
    params = next(iter(jobs.values())).params
    arms: dict[str, Any] = {}
    for slug, job in jobs.items():
        arms[slug] = measured(replace(job, execution=replace(job.execution, threads=1)), pairs=args.pairs)
        print(slug, {name: arms[slug][name] for name in ("needed", "changed", "whole", "aside", "cpu_s")}, flush=True)
    settings = {name: params[name] for name in ("batch_size", "max_new_tokens")}
    raw = {"pairs": args.pairs, **settings, **evaluation.conditions(jobs), "arms": arms}
    (args.out.parent / FIGURES).write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    write(args.out, raw)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
