"""bf16 model -> quantized model, by one scheme; its backend is a module of tasks/jobs/backends."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from recipes.models.headers import Headers, read_headers
from recipes.problem import RecipeError
from recipes.schemes import on_disk
from recipes.schemes.limits import limit_problems, quantized_linears
from recipes.schemes.scheme import Scheme
from tasks.jobs.backends import Quantized, Request
from tasks.jobs.backends.awq_scales import scales_found_on
from tasks.jobs.loading.load import setup
from tasks.jobs.measuring import block_errors
from tasks.jobs.measuring.block_errors import BlockRecord, Measured
from tasks.jobs.merging.rope import older_spelling
from tasks.jobs.serve_file import write_serve_file
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.tokenizer_files import TOKENIZER_FILES, copy_files

WEIGHTS = ("config.json", "quantize_config.json", "*.safetensors", "*.safetensors.index.json")
NO_HOST_MEMORY = "DefaultCPUAllocator"  # torch's RuntimeError where the host has no memory left
MEASURED = ("gptqmodel", "llm-compressor")  # backends whose environment can also load what they write


def run(job: Job) -> dict[str, Any]:
    """Quantize a model folder; embeddings and lm_head stay as they are. The same inputs give the same bytes.

    Reads:
        model: bf16 model folder. calibset: calibset.parquet (schemes that need calibration). scales_from: bf16 model
        folder on which AWQ's scales and clipping are searched (where it is not `model`).
    Writes:
        model*.safetensors, config.json, quantize_config.json; tokenizer files and generation_config.json byte for
        byte from `model`; quantize.json: backend, packer, kernel at load, loss, tokens and damping per layer, and what
        each attention and FFN lost and its largest activation; serve.json, serve.md.
    Metrics:
        loss by layer, in the order of the layers; error of attention and FFN by decoder layer.

    The result's `on_disk` says what the files hold: the share of the linear weights that is packed, bits a weight and
    codes used, read back from them. It stands in no file, so that no model has to be made again for it.

    Where those errors cannot be measured (memory, a model that does not load), quantize.json and the result have
    `no_errors`, the reason, and the model stands.

    Raises:
        StageError: The scheme does not fit a layer; in what was written there are inf or NaN, or layers that are not
            packed, or not on the scheme's grid.
    """
    setup(job)
    scheme = Scheme.of(job.params, slug=job.slug)
    headers = _checked(job.inputs["model"].path, scheme)
    clock = time.perf_counter()
    rows = _rows(job.inputs["calibset"].path) if scheme.needs_calibration else []
    quantized = _quantize(job, scheme, rows)
    quantize_s = time.perf_counter() - clock
    clock = time.perf_counter()
    _complete_folder(job, scheme)
    counted = _counted(job, scheme, headers, quantized)
    measured, blocks, missing = _errors(job, scheme, headers, rows=rows, quantized=quantized)
    tokens = sum(map(len, rows))
    kernel = measured and measured.kernel
    record = {
        "params": job.params,
        "sequences": len(rows),
        "tokens": tokens,
        "kernel": kernel,
        "error_tokens": measured.tokens if measured else 0,
        "stream_max": measured and measured.stream_max,
        "blocks": [asdict(block) for block in blocks],
        **missing,
        **quantized.as_dict(),
    }
    job.write_json("quantize.json", record)
    losses = [layer.loss for layer in quantized.layers if layer.loss is not None]
    _send_metrics(job, losses, blocks)
    return {
        "backend": quantized.backend,
        "packer": quantized.packer,
        "kernel": kernel,
        "layers": len(quantized.layers),
        "on_disk": counted,
        "weight_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
        "sequences": len(rows),
        "tokens": tokens,
        "loss_sum": sum(losses),
        "quantize_s": round(quantize_s, 2),
        "record_s": round(time.perf_counter() - clock, 2),
        **missing,
    }


def _rows(calibset: Path) -> list[list[int]]:
    """Token ids of the sequences, in the order of the file."""
    import pyarrow.parquet as pq  # 39 MiB that schemes without rows do not need

    return pq.read_table(calibset / "calibset.parquet", columns=["input_ids"])["input_ids"].to_pylist()


def _checked(model: Path, scheme: Scheme) -> Headers:
    """The model's headers; StageError where a layer's shape does not allow the scheme, or the backend the model."""
    try:
        headers = read_headers(model)
        problems = [*scheme.check(quantized_linears(scheme, headers)), *limit_problems(scheme, headers)]
    except RecipeError as error:
        raise StageError(error.problems[0]) from None
    if problems:
        raise StageError(problems[0])
    return headers


def _quantize(job: Job, scheme: Scheme, rows: list[list[int]]) -> Quantized:
    """Run the scheme's backend; it writes the weights and their configs."""
    request = Request(
        model=job.inputs["model"].path,
        out=job.out,
        rows=rows,
        params=job.params,
        device=job.execution.device,
        events=job.events,
    )
    # Nothing is compiled here, and bitsandbytes would import the compiler: 1 s, 48 MiB.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    backend = importlib.import_module(f"tasks.jobs.backends.{scheme.backend.replace('-', '_')}")
    with contextlib.ExitStack() as stack:
        if other := job.optional("scales_from"):
            stack.enter_context(scales_found_on(other, request))
        return backend.quantize(request)


def _complete_folder(job: Job, scheme: Scheme) -> None:
    """Check the weights, and put beside them what a model folder needs."""
    model = job.inputs["model"].path
    _keep_companions(model, job.out)
    _spell_rope(job)
    _refuse_nan(job.out)
    write_serve_file(job.out, name=job.slug, model=model, scheme=scheme)


def _counted(job: Job, scheme: Scheme, headers: Headers, quantized: Quantized) -> dict[str, Any]:
    """What the written files hold, whatever the backend says; StageError where that is another model."""
    try:
        stored = on_disk.read(job.out, scheme, headers)
    except RecipeError as error:
        raise StageError(error.problems[0]) from error
    if problem := stored.problem(claimed={layer.name for layer in quantized.layers}):
        raise StageError(problem)
    used = stored.codes_used()
    for note in stored.notes(used):
        job.events.note("on disk", note)
    return stored.record(used)


class _Errors(NamedTuple):
    """What quantization did, block by block.

    Attributes:
        measured: What the forward passes gave; None where there were none.
        blocks: The records.
        missing: `no_errors` and the reason, where they could not be measured; else empty.
    """

    measured: Measured | None
    blocks: list[BlockRecord]
    missing: dict[str, str]


def _errors(job: Job, scheme: Scheme, headers: Headers, *, rows: list[list[int]], quantized: Quantized) -> _Errors:
    """The record of errors. The model is written and checked by now: what fails here never loses it.

    A lack of memory and a model that does not load become a note and a reason. Anything else is a fault of ours.
    """
    weight_errors = {layer.name: layer.weight_error for layer in quantized.layers if layer.weight_error is not None}
    measured: Measured | None = None
    try:
        measured = _measured(job, scheme, headers, rows)
        return _Errors(measured, block_errors.records(headers, measured=measured, weight_errors=weight_errors), {})
    except (MemoryError, RuntimeError, StageError) as error:
        reason = _reason(error)
        if reason is None:
            raise
    job.events.note("errors by layer", f"not measured: {reason}. The quantized model is whole")
    blocks: list[BlockRecord] = []
    with contextlib.suppress(MemoryError):
        blocks = block_errors.records(headers, measured=None, weight_errors=weight_errors)
    return _Errors(None, blocks, {"no_errors": reason})


def _reason(error: Exception) -> str | None:
    """Why there is no record, in a line; None for a fault that is no lack of memory and no model that fails to load."""
    if isinstance(error, StageError):
        return f"{error.problem.what}: {error.problem.why}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_HOST_MEMORY in str(error):
        return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"
    return None


def _measured(job: Job, scheme: Scheme, headers: Headers, rows: list[list[int]]) -> Measured | None:
    """What each attention and FFN lost on the rows; None without rows, or where this environment cannot load it."""
    if not rows or scheme.backend not in MEASURED:
        return None
    gc.collect()  # of the backend's model
    if job.execution.device == "cuda":
        torch.cuda.empty_cache()
    measured = block_errors.measure(headers, job.out, rows=rows, device=job.execution.device)
    if warning := measured.fp16_warning():
        job.events.note("activations", warning)
    return measured


def _send_metrics(job: Job, losses: list[float], blocks: list[BlockRecord]) -> None:
    for step, loss in enumerate(losses):
        job.events.metric("quantize/loss", loss, step=step)
    for block in blocks:
        error = block.output_error if block.output_error is not None else block.weight_error
        if error is not None:
            job.events.metric(f"quantize/error/{block.part}", error, step=block.layer)


def _keep_companions(model: Path, out: Path) -> None:
    """Remove what the backend wrote beside the weights, and copy the input's tokenizer and generation config.

    GPTQModel writes both again, with other bytes, and a quant_log.csv of times.
    """
    keep = {path for pattern in WEIGHTS for path in out.glob(pattern)} | {out / "events.jsonl"}
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in keep:
            path.unlink()
    copy_files(model, out, [*TOKENIZER_FILES, "generation_config.json"])


def _spell_rope(job: Job) -> None:
    """Spell the rotary embedding also as engines with transformers 4 read it."""
    config = json.loads((job.out / "config.json").read_text(encoding="utf-8"))
    if older := older_spelling(config):
        job.write_json("config.json", config | older)


def _refuse_nan(out: Path) -> None:
    """Raise StageError where a stored float (scales among them) is inf or NaN."""
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise StageError.of(
                        what="a quantized weight holds inf or NaN",
                        where=name,
                        why="the input weight is not finite or too large for fp16 scales, or the Hessian "
                        "could not be factored",
                        next="check the merged model (quench evaluate); raise quantize.damp",
                    )
