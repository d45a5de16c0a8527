"""Calibration sets to compare the run's own with: general text, half of it, or random tokens, in the same shape."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from tasks.jobs.calibrate import Packed, write_calibset
from tasks.jobs.text.plain_texts import read_texts
from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

PREVIEWED, SHOWN_CHARS = 5, 1000


def run(job: Job) -> dict[str, Any]:
    """Write a set of as many sequences as the run's own, each as long. The same inputs give the same bytes.

    `generic`: general texts in a seeded order, each with the end-of-text token, joined and cut to these lengths.
    `mixed`: every second sequence is the run's own, the others are generic. `random`: token ids, uniform over the
    tokenizer's vocabulary without its special tokens.

    Reads:
        calibset: the run's own. dataset: tokenizer/, general.parquet. general: JSONL with `text` (generic, mixed).
    Writes:
        calibset.parquet, preview.md, summary.json.
    Metrics:
        None.

    Raises:
        StageError: Too few general texts; one of them is evaluated.
    """
    kind, seed = job.params["kind"], job.params["seed"]
    table = pq.read_table(job.inputs["calibset"].path / "calibset.parquet")
    own = [Packed(line["rows"], line["input_ids"]) for line in table.to_pylist()]
    tokenizer = load_tokenizer(job.inputs["dataset"].path / "tokenizer")
    kept = [sequence if kind == "mixed" and number % 2 == 0 else None for number, sequence in enumerate(own)]
    lengths = [len(sequence.input_ids) for sequence, same in zip(own, kept, strict=True) if same is None]
    controls = iter(_random(tokenizer, lengths, seed=seed) if kind == "random" else _generic(tokenizer, lengths, job))
    sequences = [same or next(controls) for same in kept]
    write_calibset(job.out, sequences)
    parts = [f"# Calibration set, {kind}: {PREVIEWED} of {len(sequences)} sequences (seed {seed})\n"]
    for number, sequence in enumerate(sequences[:PREVIEWED]):
        parts.append(f"## {number}, {len(sequence.input_ids)} tokens\n")
        parts.append(f"```\n{tokenizer.decode(sequence.input_ids)[:SHOWN_CHARS]}\n```\n")
    (job.out / "preview.md").write_text("\n".join(parts), encoding="utf-8")
    summary = {
        "tokens": sum(len(sequence.input_ids) for sequence in sequences),
        "sequences": len(sequences),
        "own_sequences": len(own) - len(lengths),
        "own_tokens": sum(len(sequence.input_ids) for sequence in kept if sequence),
    }
    job.write_json("summary.json", summary)
    job.events.note(
        f"calibration set, {kind}",
        f"{summary['tokens']} tokens in {summary['sequences']} sequences, in the shape of the run's own set; "
        f"{summary['own_tokens']} tokens are that set's",
    )
    return summary


def _random(tokenizer: PreTrainedTokenizerBase, lengths: list[int], *, seed: int) -> list[Packed]:
    ids = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    draw = random.Random(f"{seed}:random")
    return [Packed([], draw.choices(ids, k=length)) for length in lengths]


def _generic(tokenizer: PreTrainedTokenizerBase, lengths: list[int], job: Job) -> list[Packed]:
    """Sequences of these lengths, cut from all texts joined."""
    texts = _texts(job)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    owners: list[str] = []  # of every token
    for name in random.Random(f"{job.params['seed']}:general").sample(sorted(texts), len(texts)):
        ids = [*tokenizer(texts[name])["input_ids"], *end]
        stream += ids
        owners += [name] * len(ids)
        if len(stream) >= sum(lengths):
            break
    else:
        raise StageError.of(
            what=f"the general texts have {len(stream)} tokens; {sum(lengths)} are needed",
            where=f"calibrate.general, {len(texts)} texts",
            why="a control has as many tokens as the run's own calibration set: size must make no difference",
            next="give calibrate.general more texts, or lower calibrate.rows",
        )
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [Packed(list(dict.fromkeys(owners[start:end])), stream[start:end]) for start, end in pairwise(ends)]


def _texts(job: Job) -> dict[str, str]:
    """General texts by name.

    Raises:
        StageError: A malformed line; a text that is evaluated.
    """
    path = job.inputs["general"].path
    texts = dict(read_texts(path, what="the generic calibration text"))
    evaluated = pq.read_table(job.inputs["dataset"].path / "general.parquet", columns=["row"])["row"].to_pylist()
    if shared := sorted(set(texts) & set(evaluated)):
        raise StageError.of(
            what=f"{len(shared)} texts of calibrate.general are in data.general, too",
            where=f"{path.name}, texts {', '.join(shared[:20])}",
            why="ppl_general would be measured on what a control was calibrated on",
            next="remove them from one of the two files",
        )
    return texts
