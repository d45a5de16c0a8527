"""Adapter into the base, as a stream: onto the NF4 weights that were trained, dequantized, or the original ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from recipes.models import headers
from recipes.models.adapters import WEIGHTS, Adapter, read_adapter
from recipes.models.refusals import has_tokenizer
from recipes.models.weights import read_tensors
from recipes.problem import RecipeError
from tasks.jobs.loading.load import setup
from tasks.jobs.merging.deltas import AdapterChanges, beyond_stream, read_changes
from tasks.jobs.merging.embeddings import Embeddings, new_config, settle
from tasks.jobs.merging.nf4_record import Records
from tasks.jobs.merging.peft_merge import merge_by_peft
from tasks.jobs.merging.plan import MergeItem, merge_items
from tasks.jobs.merging.rows import PART, FourBitChecks, WeightRows, merged_rows
from tasks.jobs.merging.skeleton import Skeleton, read_skeleton
from tasks.jobs.merging.streams import Reader, Writer
from tasks.jobs.merging.weight_error import Norms, summary
from tasks.jobs.serve_file import write_serve_file
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.tokenizer_files import PROCESSOR_FILES, copy_files


def run(job: Job) -> dict[str, Any]:
    """Merge and write a plain Hugging Face folder.

    Reads:
        base: model folder. adapter: PEFT folder, with tokenizer/ where we trained it.
    Writes:
        config.json, model*.safetensors (bf16; shards of 5 GB and an index), and byte for byte from adapter/tokenizer/,
        else from the adapter's folder, else from the base's: tokenizer files, chat template, generation_config.json.
        serve.json, serve.md: how it is served; not without a tokenizer.
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
    trained_base = {"base_type": adapter.base_type, "base_type_by": adapter.evidence}
    skeleton = read_skeleton(job.inputs["base"].path, tensors)
    if reason := beyond_stream(adapter) or _needs_whole_model(job, adapter, skeleton):
        result = merge_by_peft(job, reason, config, records=Records(adapter.folder)) | {"by": "peft"}
    else:
        result = _stream(job, adapter, skeleton, tensors, config) | {"by": "stream"}
    _copy_tokenizer(job)
    if has_tokenizer(job.out):
        write_serve_file(job.out, name=job.slug, model=job.out, scheme=None)
    else:
        job.events.note(
            "tokenizer",
            "there is none, neither with the base nor with the adapter: these are weights alone, without serve.md; "
            "copy the base's tokenizer files here before it is quantized, evaluated or served",
        )
    return {"onto": job.params["onto"], "initialisation": adapter.initialisation, **trained_base, **result}


def _stream(
    job: Job, adapter: Adapter, skeleton: Skeleton, tensors: Mapping[str, headers.Tensor], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge tensor by tensor: read, change, write."""
    checks = FourBitChecks(Records(adapter.folder), Norms())
    changes = read_changes(adapter, skeleton)
    four_bit = _four_bit(job, skeleton, checks.records, changes)
    with Reader() as reader:
        reader.open([*tensors.values(), *adapter.tensors.values()])
        _check_numbers(adapter, reader)
        embeddings = settle(changes.by_parameter, skeleton, tensors, reader)
        items = merge_items(skeleton, tensors, embeddings, four_bit=four_bit)
        with Writer(job.out, [item.planned for item in items]) as writer:
            _in_parallel(job, items, lambda item: _merge_one(item, reader, writer, checks, job.execution.device))
    comparison = checks.records.conclude(job) if four_bit else {"record": "not needed"}
    job.write_json("config.json", new_config(config, tied=embeddings.tied, vocabulary=embeddings.vocabulary))
    _note_merge(job, len(changes.modules), embeddings)
    parameters = sum(torch.Size(item.planned.shape).numel() for item in items)
    return {
        **comparison,
        "layers": len(changes.modules),
        "parameters": parameters,
        "four_bit": len(four_bit),
        "untied": sorted(embeddings.untied),
        "vocabulary": embeddings.vocabulary,
        "error_over_delta": summary(checks.norms.ratios),
    }


def _note_merge(job: Job, layers: int, embeddings: Embeddings) -> None:
    onto = job.params["onto"]
    job.events.note("merge", f"{layers} layers onto the {onto} base, delta added in fp32, rounded to bf16 once")
    if embeddings.untied:
        job.events.note("embeddings", "training changed one side of the tied embeddings: untied, config.json says so")
    if embeddings.two:
        job.events.note(
            "embeddings",
            "the base's config.json ties embeddings and output layer, its files hold two that differ: kept apart, "
            "as transformers loads them, and config.json says so",
        )
    if embeddings.vocabulary is not None:
        job.events.note("embeddings", f"the vocabulary has {embeddings.vocabulary} entries now")


def _base_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise StageError.of(
            what="the base is quantized already",
            where=f"{path} quantization_config",
            why="a delta is added to plain weights; what training quantized is made again from the original ones",
            next="name the original bf16, fp16 or fp32 model",
        )
    return config


def _needs_whole_model(job: Job, adapter: Adapter, skeleton: Skeleton) -> str:
    """Why the stream cannot do it: the adapter or NF4 changes a parameter that is not one tensor of the checkpoint."""
    if not skeleton.converted:
        return ""
    present = skeleton.stored.keys() | skeleton.tied.keys() | set(skeleton.tied.values())
    four_bit = skeleton.four_bit if job.params["onto"] == "dequantized" else ()
    changed = {f"{module}.weight" for module in four_bit} | read_changes(adapter, skeleton).by_parameter.keys()
    composed = sorted(changed - present)
    return f"transformers puts {composed[0]} together from other tensors of the checkpoint" if composed else ""


def _four_bit(job: Job, skeleton: Skeleton, records: Records, changes: AdapterChanges) -> frozenset[str]:
    """The modules that go through NF4: those of the record, else those that transformers quantizes by default.

    An adapter with experts one by one is of transformers 4, in which they and their routers were linear layers too.
    """
    if job.params["onto"] != "dequantized":
        return frozenset()
    if records.record is None and skeleton.one_by_one.isdisjoint(changes.modules):
        return skeleton.four_bit
    if records.record is None:
        routers = (name for name in skeleton.names.known if name.endswith((".gate", ".shared_expert_gate")))
        return (
            skeleton.four_bit | skeleton.one_by_one | {name for name in routers if f"{name}.weight" in skeleton.stored}
        )
    records.check_names(skeleton.four_bit)
    return skeleton.four_bit & records.modules.keys()


def _check_numbers(adapter: Adapter, reader: Reader) -> None:
    bad = [name for name, stored in adapter.tensors.items() if not torch.isfinite(reader.read(stored)).all()]
    if bad:
        raise StageError.of(
            what=f"{len(bad)} tensor(s) of the adapter hold inf or NaN",
            where=f"{adapter.folder / WEIGHTS}: {', '.join(bad)}",
            why="its training diverged, or its file is damaged; merged, it would spoil whole layers",
            next="look at train/loss of the adapter; train again with a lower train.learning_rate",
        )


def _in_parallel(job: Job, items: list[MergeItem], merge: Callable[[MergeItem], None]) -> None:
    """Tensors in parallel, one torch thread each; one worker more than threads, so that some compute while others wait.

    Their order is that of the files: reading and writing stay sequential but for a few tensors.
    """
    workers = job.execution.threads + 1
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        running = [pool.submit(merge, item) for item in items]
        try:
            for done, future in enumerate(as_completed(running), start=1):
                future.result()
                job.events.progress(done, len(items), unit="tensor")
        finally:
            pool.shutdown(cancel_futures=True)


def _merge_one(item: MergeItem, reader: Reader, writer: Writer, checks: FourBitChecks, device: str) -> None:
    """Read, change and write one tensor, in parts."""
    change, name = item.change, item.planned.name
    untouched = not item.module and (change is None or change.whole_or_nothing)
    with torch.inference_mode():
        if untouched:
            for first in range(0, item.source.numel, PART["cpu"]):
                values = reader.read(item.source, first, min(first + PART["cpu"], item.source.numel))
                writer.write(name, values.to(item.planned.dtype), first)
            return
        delta = change.load(reader, device) if change else None
        matrix = WeightRows(item, reader, device)
        if not item.transposed:
            for first, rows in merged_rows(matrix, item, delta, checks):
                writer.write(name, rows, first * matrix.columns)
            return
        whole = torch.cat([rows for _, rows in merged_rows(matrix, item, delta, checks)])
        writer.write(name, whole.T)


def _copy_tokenizer(job: Job) -> None:
    """Byte for byte from where training left it; a file that is not there comes from the base."""
    base, adapter = job.inputs["base"].path, job.inputs["adapter"].path
    if (adapter / "tokenizer").is_dir():
        # Its config.json, where there is one, is the base's and says which class of tokenizer reads the folder.
        shutil.copytree(
            adapter / "tokenizer", job.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json")
        )
        return
    own = any(adapter.glob("tokenizer.*"))
    for folder in (base, adapter):
        copy_files(folder, job.out, ["generation_config.json", *PROCESSOR_FILES])
    if not own:  # of two tokenizers files do not mix
        copy_files(base, job.out)
    copy_files(adapter, job.out)
    if has_tokenizer(job.out):
        job.events.note("tokenizer", f"from the {'adapter' if own else 'base'}'s folder")
