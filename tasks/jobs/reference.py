"""Logits of nf4-adapter, the model as it was trained, or of an external model, over completions of dev and test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.jobs.loading.computing import attention_of, refuse_other_device
from tasks.jobs.loading.load import load_arm, setup
from tasks.jobs.measuring.own_tokenizer import another
from tasks.jobs.measuring.teacher_forcing import Stretch, TokenRow, batches, forced, read_rows
from tasks.jobs.measuring.tiles import WHOLE, Model, computes_in_tiles
from tasks.jobs.merging.streams import NAMES, raw_bytes
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

GIB = 1 << 30
PLACES = pa.schema([("row", pa.string()), ("split", pa.string()), ("start", pa.int64()), ("n", pa.int32())])


def run(job: Job) -> dict[str, Any]:
    """Store the logits in the type in which the model gives them, so nothing is lost.

    Reads:
        dataset: rows.parquet. base: model folder. adapter: PEFT folder. In their place model, where an external model
        is the reference.
    Writes:
        reference.safetensors: `logits` [tokens, vocabulary]; their log-softmax is the log-probabilities.
        reference.parquet: row, split, start, n: where a row's completion tokens stand, in order.
    Metrics:
        None.

    Raises:
        StageError: Logits are inf or NaN; no row fits into reference_gib; an external model has another tokenizer; the
            device is of another kind than planned.
    """
    refuse_other_device(job)
    setup(job)
    params = job.params
    rows = read_rows(job.inputs["dataset"].path, "dev", "test")
    model = _model(job, rows)
    if not computes_in_tiles(model):
        job.events.note("logits", WHOLE)
    example = _example(model)
    kept = _sample(rows, limit=int(params["reference_gib"] * GIB) // example.nbytes, seed=params["seed"])
    if len(kept) < len(rows):
        _note_sample(job, kept, of=len(rows))
    chosen = {row.row for row in kept}
    shape = (sum(row.n for row in kept), example.shape[-1])
    # Batches are formed over all rows, as evaluate forms them.
    groups = batches(rows, params["batch_size"], key=lambda row: len(row.ids))
    groups = [group for group in groups if any(row.row in chosen for row in group)]
    places: list[dict[str, Any]] = []
    start = 0
    with (job.out / "reference.safetensors").open("wb") as file:
        file.write(_header(shape, example.dtype))

        def keep(stretch: Stretch) -> None:
            if stretch.row.row in chosen:
                file.write(raw_bytes(stretch.every[stretch.counted].cpu()))

        for done, group in enumerate(groups, start=1):
            forced(model, group, keep)
            for row in group:
                if row.row in chosen:
                    places.append({"row": row.row, "split": row.split, "start": start, "n": row.n})
                    start += row.n
            job.events.progress(done, len(groups), unit="batch")
    pq.write_table(pa.Table.from_pylist(places, schema=PLACES), job.out / "reference.parquet")
    _check(job.out / "reference.safetensors", _header(shape, example.dtype), shape[0] * example.nbytes)
    sizes = {"rows": len(kept), "of_rows": len(rows), "tokens": shape[0], "vocabulary": shape[1]}
    return {**sizes, "computed": {"device": job.execution.kind, "attention": attention_of(model)}}


def _model(job: Job, rows: list[TokenRow]) -> Model:
    device = job.execution.device
    if job.params.get("kind") != "external":
        return load_arm("nf4", job.inputs["base"].path, adapter=job.inputs["adapter"].path, device=device)
    folder = job.inputs["model"].path
    why = another(folder, job.inputs["dataset"].path, rows)
    if why is None:
        return load_arm("external", folder, device=device, trusted=job.params.get("trust_remote_code", False))
    raise StageError.of(
        what=f"the reference has {why}",
        where="evaluate.reference",
        why="KL and agreement compare probabilities token by token",
        next="name a model with the base's tokenizer, or leave evaluate.reference out",
    )


def _header(shape: tuple[int, int], dtype: torch.dtype) -> bytes:
    """Of a safetensors file with one tensor; its bytes follow, so rows can be appended as they come."""
    end = shape[0] * shape[1] * dtype.itemsize
    text = json.dumps({"logits": {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [0, end]}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check(path: Path, header: bytes, data: int) -> None:
    """The header was written before the rows came: raise ValueError where it promised another size."""
    if path.stat().st_size != len(header) + data:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {len(header) + data}")


@torch.inference_mode()
def _example(model: Model) -> Tensor:
    """[1, vocabulary] logits of one token: their width may be more than config.json's, their type other than bf16."""
    return model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False).logits[0]


def _sample(rows: Sequence[TokenRow], *, limit: int, seed: int) -> list[TokenRow]:
    """Whole rows, in an order drawn by the seed and the row's own hash, while their tokens fit `limit`."""
    drawn = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row.row}".encode()).digest())
    kept: list[TokenRow] = []
    for row in drawn:
        limit -= row.n
        if limit < 0:
            break
        kept.append(row)
    return kept


def _note_sample(job: Job, kept: Sequence[TokenRow], *, of: int) -> None:
    gib = job.params["reference_gib"]
    if not kept:
        raise StageError.of(
            what=f"no row's logits fit into {gib} GiB",
            where="evaluate.reference_gib",
            why="KL is exact over the vocabulary, so whole rows of logits are stored",
            next="raise evaluate.reference_gib",
        )
    job.events.note("reference", f"{len(kept)} of {of} rows of dev and test fit into {gib} GiB: KL is over these")
