"""Train rows -> calibration set: drawn over the domains, packed whole, fixed as token ids."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.problem import Problem
from recipes.rows import normalised
from tasks.runtime.errors import StageError
from tasks.runtime.job import Job

CALIBSET = pa.schema([("sequence", pa.int32()), ("rows", pa.list_(pa.string())), ("input_ids", pa.list_(pa.int32()))])
LEAST, MOST = 128, 512  # rows, see recipes.schema.Calibrate
PREVIEW_ROWS = 5


class Candidate(NamedTuple):
    """A row that may be drawn."""

    row: str
    domain: str
    messages: str
    input_ids: list[int]


def run(job: Job) -> dict[str, Any]:
    """Draw, pack and write the calibration set. The same inputs give the same bytes.

    Reads:
        dataset: rows.parquet.
    Writes:
        calibset.parquet (one line a sequence), preview.md, summary.json.
    Metrics:
        None.

    Raises:
        StageError: Too few rows or tokens in train; a row of train is in dev or test, too.
    """
    params, path = job.params, job.inputs["dataset"].path / "rows.parquet"
    columns = ["row", "split", "domain", "messages", "input_ids"]
    rows = pq.read_table(path, columns=columns).to_pylist()
    train = [row for row in rows if row["split"] == "train"]
    _refuse_leak(train, [row for row in rows if row["split"] != "train"], path=path)

    strata: dict[str, list[Candidate]] = defaultdict(list)
    for row in sorted(train, key=lambda one: one["row"]):
        if len(row["input_ids"]) <= params["seq_len"]:
            strata[row["domain"]].append(Candidate(row["row"], row["domain"], row["messages"], row["input_ids"]))
    fitting = sum(map(len, strata.values()))
    if fitting < len(train):
        job.events.note(
            "too long", f"{len(train) - fitting} train rows are over seq_len {params['seq_len']} and left out"
        )
    if fitting < params["rows"]:
        raise _too_few_rows(params, len(train), fitting=fitting)
    drawn = _draw(strata, total=params["rows"], equal=params["stratify"] == "equal", seed=params["seed"])
    tokens = sum(len(one.input_ids) for one in drawn)
    if tokens < params.get("min_tokens", 0):
        raise _too_few_tokens(params, tokens=tokens, fitting=fitting)
    packed = pack(drawn, seq_len=params["seq_len"])
    lines = [
        {
            "sequence": number,
            "rows": [one.row for one in sequence],
            "input_ids": [token for one in sequence for token in one.input_ids],
        }
        for number, sequence in enumerate(packed)
    ]
    pq.write_table(pa.Table.from_pylist(lines, schema=CALIBSET), job.out / "calibset.parquet")
    (job.out / "preview.md").write_text(_preview(drawn, params), encoding="utf-8")
    summary = {
        "rows": len(drawn),
        "tokens": tokens,
        "sequences": len(packed),
        "fill": tokens / (len(packed) * params["seq_len"]),
        "domains": {domain: sum(one.domain == domain for one in drawn) for domain in sorted(strata)},
        "too_long_rows": len(train) - fitting,
    }
    (job.out / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    job.events.note(
        "calibration set",
        f"{len(drawn)} rows of {len(train)}, {tokens} tokens in {len(packed)} sequences of up to {params['seq_len']} "
        f"({summary['fill']:.0%} full)",
    )
    return summary


def allot(sizes: dict[str, int], *, total: int, equal: bool) -> dict[str, int]:
    """Share `total` rows out over strata of these sizes, none more than it holds: largest remainders, ties by name.

    Args:
        sizes: Rows a stratum holds; their sum is at least `total`.
        total: Rows wanted.
        equal: Equal shares; else in proportion to size.
    """
    weight = dict.fromkeys(sizes, 1) if equal else dict(sizes)
    given: dict[str, int] = {}
    while True:  # a stratum whose share is all it holds gives all; the others share the rest anew
        left = {name: weight[name] for name in sizes if name not in given}
        rest = total - sum(given.values())
        share = {name: rest * weight[name] / (sum(left.values()) or 1) for name in left}
        full = {name: sizes[name] for name in left if share[name] >= sizes[name]}
        if not full:
            break
        given |= full
    given |= {name: math.floor(share[name]) for name in left}
    by_remainder = sorted(left, key=lambda name: (math.floor(share[name]) - share[name], name))
    for name in by_remainder[: total - sum(given.values())]:
        given[name] += 1
    return given


def pack(rows: list[Candidate], *, seq_len: int) -> list[list[Candidate]]:
    """Whole rows into sequences of at most `seq_len` tokens: first-fit decreasing, ties by row, so deterministic."""
    sequences: list[list[Candidate]] = []
    free: list[int] = []
    for row in sorted(rows, key=lambda one: (-len(one.input_ids), one.row)):
        length = len(row.input_ids)
        place = next((i for i, left in enumerate(free) if left >= length), len(free))
        if place == len(free):
            sequences.append([])
            free.append(seq_len)
        sequences[place].append(row)
        free[place] -= length
    return sequences


def _draw(strata: dict[str, list[Candidate]], *, total: int, equal: bool, seed: int) -> list[Candidate]:
    """A seeded sample of each stratum, with a generator of its own: its rows do not depend on other strata's."""
    drawn = []
    for domain, count in allot({name: len(strata[name]) for name in sorted(strata)}, total=total, equal=equal).items():
        drawn += random.Random(f"{seed}:{domain}").sample(strata[domain], count)
    return drawn


def _refuse_leak(train: list[dict[str, Any]], held: list[dict[str, Any]], *, path: Path) -> None:
    """Raise StageError where a row of train, by hash, text or tokens, is in dev or test."""

    def names(row: dict[str, Any]) -> set[object]:
        return {row["row"], normalised(json.loads(row["messages"])), tuple(row["input_ids"])}

    seen = set[object]().union(*map(names, held))
    leaked = [row["row"] for row in train if names(row) & seen]
    if leaked:
        raise StageError(
            Problem(
                what=f"{len(leaked)} row(s) of train stand in dev or test, too",
                where=f"{path}, rows {', '.join(leaked[:20])}",
                why="weights would be calibrated on what they are judged by",
                next="make the dataset again with quench run; prepare removes duplicates",
            )
        )


def _too_few_rows(params: dict[str, Any], train: int, *, fitting: int) -> StageError:
    remedy = f"set calibrate.rows to {min(fitting, MOST)}" if fitting >= LEAST else "give more training rows"
    if fitting < train:
        remedy += ", or raise calibrate.seq_len"
    return StageError(
        Problem(
            what=f"calibration needs {params['rows']} rows; train has {fitting} of up to {params['seq_len']} tokens",
            where="calibrate.rows, calibrate.seq_len",
            why=f"below {LEAST} rows the Hessian of a wide layer is not of full rank and scales follow single rows",
            next=remedy,
        )
    )


def _too_few_tokens(params: dict[str, Any], *, tokens: int, fitting: int) -> StageError:
    needed = math.ceil(params["min_tokens"] * params["rows"] / tokens)
    most = min(fitting, MOST)
    remedy = f"{needed} rows like these would do, more than the {most} there can be: give longer rows"
    if needed <= most:
        remedy = f"set calibrate.rows to {needed}"
    return StageError(
        Problem(
            what=f"{params['rows']} rows give {tokens} calibration tokens; {params['min_tokens']} are needed",
            where="calibrate.rows",
            why="with fewer tokens than a layer has inputs its Hessian is not of full rank",
            next=remedy,
        )
    )


def _preview(drawn: list[Candidate], params: dict[str, Any]) -> str:
    """The first rows by name, readable."""
    parts = [f"# Calibration set: {PREVIEW_ROWS} of {len(drawn)} rows (seed {params['seed']})\n"]
    for one in sorted(drawn, key=lambda candidate: candidate.row)[:PREVIEW_ROWS]:
        parts.append(f"## {one.row}, {len(one.input_ids)} tokens, domain {one.domain or '(none)'}\n")
        for turn in json.loads(one.messages):
            said = turn.get("content") or json.dumps(turn.get("tool_calls"), ensure_ascii=False)
            parts.append(f"**{turn['role']}**\n\n```\n{said}\n```\n")
    return "\n".join(parts)
