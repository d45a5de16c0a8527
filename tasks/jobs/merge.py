"""Adapter into the base, as a stream: onto the NF4 weights that were trained, dequantized, or the original ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.models import headers
from recipes.models.adapters import WEIGHTS, Adapter, read_adapter
from recipes.models.weights import read_tensors
from recipes.problem import Problem, RecipeError
from tasks.jobs.loading.load import setup
from tasks.jobs.merging.deltas import Change, Delta, beyond_stream, read_changes
from tasks.jobs.merging.embeddings import Embeddings, new_config, settle
from tasks.jobs.merging.nf4 import quantize, row_step, sample_positions
from tasks.jobs.merging.nf4_record import Records
from tasks.jobs.merging.peft_merge import merge_by_peft
from tasks.jobs.merging.skeleton import Skeleton, read_skeleton
from tasks.jobs.merging.streams import DTYPES, Planned, Reader, Writer
from tasks.jobs.merging.weight_error import Norms, summary
from tasks.jobs.serve_file import write_serve_file
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.tokenizer_files import copy_files

# Elements that are worked on at once: on a CPU 1 MiB in fp32, which stays in the cache (quantizing 4096 x 4096 takes
# 0.36 s in such parts and 0.49 s at once); a GPU wants more.
PART = {"cpu": 1 << 18, "cuda": 1 << 24}


class Item(NamedTuple):
    """One tensor to write.

    Attributes:
        planned: Its name, type and shape in the merged checkpoint.
        source: Where its values come from, base or adapter.
        module: Name of its module where that was 4-bit in training and the merge goes onto those weights, else "".
        transposed: It is stored [in, out].
        change: What the adapter does to it.
    """

    planned: Planned
    source: headers.Tensor
    module: str = ""
    transposed: bool = False
    change: Change | None = None


class Seen(NamedTuple):
    """What is noted of the 4-bit modules while they pass by."""

    records: Records
    norms: Norms


def run(job: Job) -> dict[str, Any]:
    """Merge and write a plain Hugging Face folder.

    Reads:
        base: model folder. adapter: PEFT folder, with tokenizer/ where we trained it.
    Writes:
        config.json, model*.safetensors (bf16; shards of 5 GB and an index), and byte for byte from adapter/tokenizer/,
        else from the adapter's folder, else from the base's: tokenizer files, chat template, generation_config.json.
        serve.json, serve.md: how it is served.
    Metrics:
        None.

    Raises:
        StageError: Adapter and base do not belong together or are broken; NaN; the base that was trained is another;
            the disk is full.
    """
    setup(job)
    try:
        adapter = read_adapter(job.inputs["adapter"].path)
        tensors = read_tensors(job.inputs["base"].path)
    except RecipeError as error:
        raise StageError(error.problems[0]) from error
    config = _base_config(job.inputs["base"].path)
    base_type = {"base_type": adapter.base_type, "base_type_by": adapter.evidence}
    skeleton = read_skeleton(job.inputs["base"].path, tensors)
    if why := beyond_stream(adapter) or _needs_whole_model(adapter, skeleton):
        result = merge_by_peft(job, why) | {"by": "peft", "record": "not compared"}
    else:
        result = _stream(job, adapter, skeleton, tensors, config) | {"by": "stream"}
    _copy_tokenizer(job)
    write_serve_file(job.out, name=job.slug, model=job.out, scheme=None)
    return {"onto": job.params["onto"], "initialisation": adapter.initialisation, **base_type, **result}


def _stream(
    job: Job,
    adapter: Adapter,
    skeleton: Skeleton,
    tensors: Mapping[str, headers.Tensor],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    records = Records(adapter.folder)
    four_bit = _four_bit(job, skeleton, records)
    norms = Norms()
    with Reader() as reader:
        reader.open([*tensors.values(), *adapter.tensors.values()])
        _check_numbers(adapter, reader)
        changes = read_changes(adapter, skeleton)
        embeddings = settle(changes.by_parameter, skeleton, tensors, reader)
        items = _items(skeleton, tensors, embeddings, four_bit=four_bit)
        with Writer(job.out, [item.planned for item in items]) as writer:
            _work(job, items, lambda item: _merge_one(item, reader, writer, Seen(records, norms), job.execution.device))
    found = records.conclude(job) if four_bit else {"record": "not needed"}
    text = json.dumps(new_config(config, embeddings), indent=2, sort_keys=True) + "\n"
    (job.out / "config.json").write_text(text, encoding="utf-8")
    _tell(job, len(changes.modules), embeddings)
    parameters = sum(torch.Size(item.planned.shape).numel() for item in items)
    return {
        **found,
        "layers": len(changes.modules),
        "parameters": parameters,
        "four_bit": len(four_bit),
        "untied": sorted(embeddings.untied),
        "vocabulary": embeddings.vocabulary,
        "error_over_delta": summary(norms.ratios),
    }


def _tell(job: Job, layers: int, embeddings: Embeddings) -> None:
    onto = job.params["onto"]
    job.events.note("merge", f"{layers} layers onto the {onto} base, delta added in fp32, rounded to bf16 once")
    if embeddings.untied:
        job.events.note("embeddings", "training changed one side of the tied embeddings: untied, config.json says so")
    if embeddings.vocabulary is not None:
        job.events.note("embeddings", f"the vocabulary has {embeddings.vocabulary} entries now")


def _base_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise StageError(
            Problem(
                what="the base is quantized already",
                where=f"{path} quantization_config",
                why="a delta is added to plain weights; what training quantized is made again from the original ones",
                next="name the original bf16, fp16 or fp32 model",
            )
        )
    return config


def _needs_whole_model(adapter: Adapter, skeleton: Skeleton) -> str:
    """A parameter that the adapter or NF4 touches and that is not one tensor of the checkpoint."""
    if not skeleton.converted:
        return ""
    present = skeleton.stored.keys() | skeleton.tied.keys() | set(skeleton.tied.values())
    wanted = {f"{module}.weight" for module in skeleton.four_bit} | read_changes(adapter, skeleton).by_parameter.keys()
    apart = sorted(wanted - present)
    return f"transformers puts {apart[0]} together from other tensors of the checkpoint" if apart else ""


def _four_bit(job: Job, skeleton: Skeleton, records: Records) -> frozenset[str]:
    """The modules that go through NF4: those of the record, else those that transformers quantizes by default."""
    if job.params["onto"] != "dequantized":
        return frozenset()
    if records.record is None:
        return skeleton.four_bit
    records.check_names(skeleton.four_bit)
    return skeleton.four_bit & records.modules.keys()


def _check_numbers(adapter: Adapter, reader: Reader) -> None:
    bad = [name for name, stored in adapter.tensors.items() if not torch.isfinite(reader.read(stored)).all()]
    if bad:
        raise StageError(
            Problem(
                what=f"{len(bad)} tensor(s) of the adapter hold inf or NaN",
                where=f"{adapter.folder / WEIGHTS}: {', '.join(bad)}",
                why="its training diverged, or its file is damaged; merged, it would spoil whole layers",
                next="look at train/loss of the adapter; train again with a lower train.learning_rate",
            )
        )


def _items(
    skeleton: Skeleton,
    tensors: Mapping[str, headers.Tensor],
    embeddings: Embeddings,
    *,
    four_bit: frozenset[str],
) -> list[Item]:
    """Everything that is written, in the order in which the base has it.

    Raises:
        StageError: The base lacks parameters of its own architecture.
    """
    absent = skeleton.shapes.keys() - skeleton.stored.keys() - _shared(skeleton)
    if absent and not skeleton.converted:
        raise StageError(
            Problem(
                what=f"{len(absent)} tensor(s) of the base are missing",
                where=", ".join(sorted(absent)),
                why="its architecture (config.json) has them, its weight files do not",
                next="download or write the base again",
            )
        )
    parameter = {stored: name for name, stored in skeleton.stored.items()}
    items = []
    for stored in tensors.values():
        name = parameter.get(stored.name)
        if name is None:  # no parameter of the model, or a part of one that nothing changes: copied as it is
            items.append(Item(Planned(stored.name, DTYPES[stored.dtype], stored.shape), stored))
        elif name not in embeddings.dropped:
            items.append(_item(stored.name, name, stored, skeleton, embeddings, four_bit=four_bit))
    for name, origin in embeddings.untied.items():
        if name not in skeleton.stored:
            stored = tensors[skeleton.stored[origin]]
            items.append(_item(name, name, stored, skeleton, embeddings, four_bit=four_bit))
    return items


def _shared(skeleton: Skeleton) -> set[str]:
    """Parameters that another one stands for."""
    pairs = skeleton.tied.items()
    return {b if a in skeleton.stored else a for a, b in pairs if a in skeleton.stored or b in skeleton.stored}


def _item(
    written: str,
    name: str,
    stored: headers.Tensor,
    skeleton: Skeleton,
    embeddings: Embeddings,
    *,
    four_bit: frozenset[str],
) -> Item:
    module, _, leaf = name.rpartition(".")
    change = embeddings.changes.get(name)
    source = change.full if change and change.full else stored
    dtype = skeleton.dtypes[name] if DTYPES[stored.dtype].is_floating_point else DTYPES[stored.dtype]
    return Item(
        planned=Planned(written, dtype, source.shape),
        source=source,
        module=module if module in four_bit and leaf == "weight" else "",
        transposed=module in skeleton.transposed and leaf == "weight",
        change=change,
    )


def _work(job: Job, items: list[Item], one: Callable[[Item], None]) -> None:
    """Tensors in parallel, one torch thread each; one worker more than threads, so that some compute while others wait.

    Their order is that of the files: reading and writing stay sequential but for a few tensors.
    """
    workers = job.execution.threads + 1
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        running = [pool.submit(one, item) for item in items]
        try:
            for done, future in enumerate(as_completed(running), start=1):
                future.result()
                job.events.progress(done, len(items), unit="tensor")
        finally:
            pool.shutdown(cancel_futures=True)


def _merge_one(item: Item, reader: Reader, writer: Writer, seen: Seen, device: str) -> None:
    """Read, change and write one tensor, in parts."""
    change, name = item.change, item.planned.name
    untouched = not item.module and (change is None or (change.a is None and change.shift is None))
    with torch.inference_mode():
        if untouched:
            for first in range(0, item.source.numel, PART["cpu"]):
                values = reader.read(item.source, first, min(first + PART["cpu"], item.source.numel))
                writer.write(name, values.to(item.planned.dtype), first)
            return
        delta = change.load(reader, device) if change else None
        matrix = _Matrix(item, reader, device)
        if not item.transposed:
            for first, rows in _merged(matrix, item, delta, seen):
                writer.write(name, rows, first * matrix.columns)
            return
        whole = torch.cat([rows for _, rows in _merged(matrix, item, delta, seen)])
        writer.write(name, whole.T)


class _Matrix:
    """A tensor as rows [out, in] of bf16 on the device, as loading the base gives it; a bias is rows of one."""

    def __init__(self, item: Item, reader: Reader, device: str) -> None:
        shape = tuple(reversed(item.source.shape)) if item.transposed else item.source.shape
        self.rows, self.columns = shape[0], (shape[1] if len(shape) > 1 else 1)
        self.is_bias = len(shape) == 1
        self._item, self._reader, self._device = item, reader, device
        self._whole = reader.whole(item.source).T.contiguous() if item.transposed else None
        step = row_step(self.columns)
        step *= max(1, PART[device] // (step * self.columns))
        self.spans = [(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]

    def read(self, first: int, last: int) -> Tensor:
        """Rows first to last (exclusive)."""
        if self._whole is not None:
            rows = self._whole[first:last]
        else:
            rows = self._reader.read(self._item.source, first * self.columns, last * self.columns)
            rows = rows.view(-1, self.columns)
        return rows.to(self._device, self._item.planned.dtype)


def _merged(matrix: _Matrix, item: Item, delta: Delta | None, seen: Seen) -> Iterator[tuple[int, Tensor]]:
    """First row and merged rows of each part, on the CPU.

    Raises:
        StageError: inf or NaN in the merged weights.
    """
    for first, rows in _nf4(matrix, item.module, seen.records) if item.module else _plain(matrix):
        if delta is not None:
            summed = rows.to(torch.float32, copy=True)  # it is changed in place
            changed = delta.apply(summed.flatten() if matrix.is_bias else summed, first)
            if item.module:
                original = matrix.read(first, first + len(rows))
                seen.norms.add(item.module, original=original, dequantized=rows, merged=changed)
            rows = changed.to(item.planned.dtype)
            _check_finite(rows, item.planned.name)
        yield first, rows.cpu()


def _plain(matrix: _Matrix) -> Iterator[tuple[int, Tensor]]:
    for first, last in matrix.spans:
        yield first, matrix.read(first, last)


def _nf4(matrix: _Matrix, module: str, records: Records) -> Iterator[tuple[int, Tensor]]:
    """The rows as NF4 makes them, compared with the record."""
    weight = quantize(matrix.read(first, last) for first, last in matrix.spans)
    places, samples = torch.tensor(sample_positions(matrix.rows * matrix.columns)), []
    for first, last in matrix.spans:
        rows = weight.rows(first, last)
        begin, end = first * matrix.columns, last * matrix.columns
        inside = places[(places >= begin) & (places < end)] - begin
        samples.append(rows.flatten()[inside.to(rows.device)].cpu())
        yield first, rows
    records.compare(module, weight, torch.cat(samples))


def _check_finite(rows: Tensor, name: str) -> None:
    if not torch.isfinite(rows).all():
        raise StageError(
            Problem(
                what="the merged weights hold inf or NaN",
                where=name,
                why="the adapter itself has none, so the base's file is damaged or the sum leaves bf16's range",
                next="download the base again; train again with a lower train.learning_rate",
            )
        )


def _copy_tokenizer(job: Job) -> None:
    """Byte for byte from where training left it; a file that is not there comes from the base."""
    base, adapter = job.inputs["base"].path, job.inputs["adapter"].path
    if (adapter / "tokenizer").is_dir():
        shutil.copytree(adapter / "tokenizer", job.out, dirs_exist_ok=True)
        return
    own = any(adapter.glob("tokenizer.*"))
    for folder in (base, adapter):
        copy_files(folder, job.out, ["generation_config.json"])
    if not own:  # of two tokenizers files do not mix
        copy_files(base, job.out)
    copy_files(adapter, job.out)
    job.events.note("tokenizer", f"from the {'adapter' if own else 'base'}'s folder")
