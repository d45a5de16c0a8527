"""Train rows -> calibration set: distinct rows over domains and lengths, packed whole, fixed as token ids."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from recipes.data.turns import Message
from recipes.schema import FEWEST_ROWS, LEAST_ROWS, MOST_ROWS
from tasks.jobs.text.leaks import HeldOut, StoredTurns, near_twins, refuse_leaks, without_near_duplicates
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

pc: Any = pyarrow.compute  # its functions are made when it is imported: no types
CALIBSET = pa.schema([("sequence", pa.int32()), ("rows", pa.list_(pa.string())), ("input_ids", pa.list_(pa.int32()))])
LENGTHS = ("short", "middle", "long")  # terciles of a domain's rows by tokens
PREVIEW_ROWS = 5


DRAWABLE = pa.schema(
    [("row", pa.string()), ("domain", pa.string()), ("messages", pa.string()), ("input_ids", pa.list_(pa.int32()))]
)


class Candidate(NamedTuple):
    """A row that may be drawn; what it holds stays in the table of train, at this place."""

    row: str
    domain: str
    tokens: int
    place: int


class DrawableRow(NamedTuple):
    """A row that is drawn."""

    row: str
    domain: str
    messages: str
    input_ids: list[int]

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.input_ids)

    @property
    def turns(self) -> list[Message]:
        """Its turns."""
        return json.loads(self.messages)


AnyRow = TypeVar("AnyRow", Candidate, DrawableRow)


class Packed(NamedTuple):
    """A sequence: the rows (or texts) that it is made of, by name, and its tokens."""

    rows: list[str]
    input_ids: list[int]


class Pool(NamedTuple):
    """Rows that may be drawn, and how many of train cannot be.

    Attributes:
        strata: Rows by domain, sorted by name.
        train: Rows of train.
        too_long: Rows over seq_len.
        near_duplicates: Rows that are almost equal to one that may be drawn.
    """

    strata: dict[str, list[Candidate]]
    train: int
    too_long: int
    near_duplicates: int

    @property
    def rows(self) -> int:
        """How many may be drawn."""
        return sum(map(len, self.strata.values()))


def run(job: Job) -> dict[str, Any]:
    """Draw, pack and write the calibration set. The same inputs give the same bytes.

    Reads:
        dataset: rows.parquet.
    Writes:
        calibset.parquet (one line per sequence), preview.md, summary.json; near_twins.jsonl: rows that are almost equal
        to one of dev or test.
    Metrics:
        None.

    Raises:
        StageError: Too few rows or tokens in train, or in a domain whose share is given; a row of train is in dev or
            test, too; too many near-twins of these.
    """
    path = job.inputs["dataset"].path / "rows.parquet"
    rows = pq.read_table(path, columns=["split", *DRAWABLE.names])
    in_train = pc.equal(rows["split"], "train")
    train, held = rows.filter(in_train), rows.filter(pc.invert(in_train))
    refuse_leaks(train, held, path=path)
    return calibset(train, held, job=job)


def calibset(train: pa.Table, held: pa.Table | None, *, job: Job) -> dict[str, Any]:
    """Draw from `train`, pack and write what run() says.

    Args:
        train: row (name), domain, messages (JSON), input_ids.
        held: The same of dev and test, with their split; None where nothing is held out.
        job: Params of the calibrate step.

    Raises:
        StageError: As run, but for leaks.
    """
    params = job.params
    pool = _pool(train, job)
    if pool.rows < params["rows"]:
        raise _too_few_rows(params, pool)
    candidates = _draw(pool.strata, counts=_counts(pool.strata, params), seed=params["seed"])
    drawn = [
        DrawableRow(row.row, row.domain, train["messages"][row.place].as_py(), train["input_ids"][row.place].as_py())
        for row in candidates
    ]
    tokens = sum(len(row.input_ids) for row in drawn)
    if tokens < params.get("min_tokens", 0):
        raise _too_few_tokens(params, tokens=tokens, pool=pool)
    twins = 0
    if held is not None:
        splits = dict(zip(held["row"].to_pylist(), held["split"].to_pylist(), strict=True))
        twins = near_twins(
            {row.row: row.turns for row in drawn},
            HeldOut(splits, StoredTurns(held["messages"], {name: place for place, name in enumerate(splits)})),
            most=params["max_near_duplicates"],
            job=job,
        )
    packed = pack(drawn, seq_len=params["seq_len"])
    joined = [Packed([row.row for row in rows], [id for row in rows for id in row.input_ids]) for rows in packed]
    write_calibset(job.out, joined)
    (job.out / "preview.md").write_text(_preview(drawn, params), encoding="utf-8")
    summary = {
        "rows": len(drawn),
        "tokens": tokens,
        "sequences": len(packed),
        "fill": tokens / (len(packed) * params["seq_len"]),
        "domains": {domain: sum(row.domain == domain for row in drawn) for domain in sorted(pool.strata)},
        "too_long_rows": pool.too_long,
        "near_duplicate_rows": pool.near_duplicates,
        "near_twins": twins,
    }
    job.write_json("summary.json", summary)
    _note(job, summary, pool)
    return summary


def write_calibset(out: Path, sequences: Sequence[Packed]) -> None:
    """calibset.parquet: one line per sequence."""
    lines = [{"sequence": number, **sequence._asdict()} for number, sequence in enumerate(sequences)]
    pq.write_table(pa.Table.from_pylist(lines, schema=CALIBSET), out / "calibset.parquet")


def _note(job: Job, summary: dict[str, Any], pool: Pool) -> None:
    params = job.params
    job.events.note(
        "calibration set",
        f"{summary['rows']} rows of {pool.train}, {summary['tokens']} tokens in {summary['sequences']} sequences of up "
        f"to {params['seq_len']} ({summary['fill']:.0%} full)",
    )
    if params.get("allow_unusual_size"):
        job.events.note("unusual size", f"calibrate.rows is {params['rows']}: {params['allow_unusual_size']}")
    if pool.too_long:
        job.events.note("too long", f"{pool.too_long} train rows are over seq_len {params['seq_len']} and left out")
    if pool.near_duplicates:
        job.events.note(
            "near-duplicates", f"{pool.near_duplicates} train rows are almost equal to another one and left out"
        )


def _pool(train: pa.Table, job: Job) -> Pool:
    """Rows of train that fit a sequence, each of them unlike the others."""
    seq_len = job.params["seq_len"]
    names, domains = train["row"].to_pylist(), train["domain"].to_pylist()
    tokens = pc.list_value_length(train["input_ids"]).to_pylist()
    every = (Candidate(names[place], domains[place], tokens[place], place) for place in range(len(train)))
    fitting = {candidate.row: candidate for candidate in sorted(every) if candidate.tokens <= seq_len}
    places = {name: candidate.place for name, candidate in fitting.items()}
    distinct = without_near_duplicates(StoredTurns(train["messages"], places))
    strata: dict[str, list[Candidate]] = defaultdict(list)
    for name in distinct:
        strata[fitting[name].domain].append(fitting[name])
    return Pool(strata, len(train), len(train) - len(fitting), len(fitting) - len(distinct))


def _counts(strata: Mapping[str, Sequence[Candidate]], params: dict[str, Any]) -> dict[str, int]:
    """Rows to draw from each domain.

    Raises:
        StageError: A share is given for a domain that train does not have, or has too few rows of.
    """
    sizes = {name: len(strata[name]) for name in sorted(strata)}
    stratify, total = params["stratify"], params["rows"]
    if not isinstance(stratify, dict):
        return allot(sizes, total=total, weights=sizes if stratify == "proportional" else dict.fromkeys(sizes, 1))
    counts = allot(dict.fromkeys(stratify, total), total=total, weights=stratify)
    short = {name: count for name, count in counts.items() if count > sizes.get(name, 0)}
    if short:
        missing = ", ".join(
            f"{count} of {name or '(none)'}, which has {sizes.get(name, 0)}" for name, count in short.items()
        )
        raise StageError.of(
            what=f"calibrate.stratify asks for {missing}",
            where="calibrate.stratify",
            why="given shares are kept exactly; these rows of train are distinct and fit seq_len",
            next=f"give them smaller shares of {total}, or take fewer rows; domains are {', '.join(sizes)}",
        )
    return counts


def allot(sizes: Mapping[str, int], *, total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Share `total` rows out over strata of these sizes, none more than it holds: largest remainders, ties by name.

    Args:
        sizes: Rows in each stratum; their sum is at least `total`.
        total: Rows to allot.
        weights: Shares are in proportion to these.
    """
    shares: dict[str, int] = {}
    while True:  # a stratum whose share is all of its rows gives them all; the others share the rest again
        left = {name: weights[name] for name in sizes if name not in shares}
        rest = total - sum(shares.values())
        share = {name: rest * weights[name] / (sum(left.values()) or 1) for name in left}
        full = {name: sizes[name] for name in left if share[name] >= sizes[name]}
        if not full:
            break
        shares |= full
    shares |= {name: math.floor(share[name]) for name in left}
    by_remainder = sorted(left, key=lambda name: (math.floor(share[name]) - share[name], name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def pack(rows: list[DrawableRow], *, seq_len: int) -> list[list[DrawableRow]]:
    """Whole rows into sequences of at most `seq_len` tokens: first-fit decreasing, ties by row, so deterministic."""
    sequences: list[list[DrawableRow]] = []
    free: list[int] = []
    for row in sorted(rows, key=lambda row: (-len(row.input_ids), row.row)):
        length = len(row.input_ids)
        place = next((i for i, left in enumerate(free) if left >= length), len(free))
        if place == len(free):
            sequences.append([])
            free.append(seq_len)
        sequences[place].append(row)
        free[place] -= length
    return sequences


def _draw(strata: Mapping[str, Sequence[Candidate]], *, counts: Mapping[str, int], seed: int) -> list[Candidate]:
    """A seeded sample of each stratum, each with its own generator: its rows do not depend on other strata.

    A domain's rows come in equal parts from its short, middle and long ones.
    """
    drawn: list[Candidate] = []
    for domain, count in counts.items():
        thirds = by_length(strata[domain])
        sizes = {name: len(rows) for name, rows in thirds.items()}
        for name, share in allot(sizes, total=count, weights=sizes).items():
            drawn += random.Random(f"{seed}:{domain}:{name}").sample(thirds[name], share)
    return drawn


def by_length(rows: Sequence[AnyRow]) -> dict[str, list[AnyRow]]:
    """Terciles by tokens, ties by name; of equal size to within one row."""
    ordered = sorted(rows, key=lambda row: (row.tokens, row.row))
    ends = [len(ordered) * third // 3 for third in range(4)]
    return {name: ordered[ends[i] : ends[i + 1]] for i, name in enumerate(LENGTHS)}


def _most(params: dict[str, Any], fitting: int) -> int:
    """Rows that there can be."""
    return fitting if params.get("allow_unusual_size") else min(fitting, MOST_ROWS)


def _too_few_rows(params: dict[str, Any], pool: Pool) -> StageError:
    remedy = f"set calibrate.rows to {min(pool.rows, MOST_ROWS)}"
    if pool.rows < LEAST_ROWS:
        remedy = "give more training rows"
        if pool.rows >= FEWEST_ROWS:
            remedy += f", or set calibrate.rows to {pool.rows} and give calibrate.allow_unusual_size a reason"
    if pool.too_long:
        remedy += ", or raise calibrate.seq_len"
    return StageError.of(
        what=f"calibration needs {params['rows']} rows; train has {pool.rows} distinct ones of up to "
        f"{params['seq_len']} tokens",
        where="calibrate.rows, calibrate.seq_len",
        why=f"below {LEAST_ROWS} rows the Hessian of a wide layer is not of full rank and scales follow single rows",
        next=remedy,
    )


def _too_few_tokens(params: dict[str, Any], *, tokens: int, pool: Pool) -> StageError:
    needed = math.ceil(params["min_tokens"] * params["rows"] / tokens)
    most = _most(params, pool.rows)
    remedy = f"{needed} rows like these would do, more than the {most} there can be: give longer rows"
    if needed <= pool.rows and needed > most:
        remedy += ", or give calibrate.allow_unusual_size a reason"
    if needed <= most:
        remedy = f"set calibrate.rows to {needed}"
    return StageError.of(
        what=f"{params['rows']} rows give {tokens} calibration tokens; {params['min_tokens']} are needed",
        where="calibrate.rows",
        why="with fewer tokens than a layer has inputs its Hessian is not of full rank",
        next=remedy,
    )


def _preview(drawn: list[DrawableRow], params: dict[str, Any]) -> str:
    """The first rows by name, readable."""
    parts = [f"# Calibration set: {PREVIEW_ROWS} of {len(drawn)} rows (seed {params['seed']})\n"]
    for row in sorted(drawn, key=lambda row: row.row)[:PREVIEW_ROWS]:
        parts.append(f"## {row.row}, {len(row.input_ids)} tokens, domain {row.domain or '(none)'}\n")
        for turn in row.turns:
            text = turn.get("content") or json.dumps(turn.get("tool_calls"), ensure_ascii=False)
            parts.append(f"**{turn['role']}**\n\n```\n{text}\n```\n")
    return "\n".join(parts)
