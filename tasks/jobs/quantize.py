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
from typing import Any

import torch
from safetensors import safe_open

from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.schemes.limits import limit_problems
from recipes.schemes.scheme import Scheme
from tasks.jobs.backends import Quantized
from tasks.jobs.backends.awq_scales import scales_found_on
from tasks.jobs.loading.load import setup
from tasks.jobs.measuring import block_errors
from tasks.jobs.merging.rope import older_spelling
from tasks.jobs.serve_file import write_serve_file
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.tokenizer_files import TOKENIZER_FILES, copy_files

WEIGHTS = ("config.json", "quantize_config.json", "*.safetensors", "*.safetensors.index.json")
MEASURED = ("gptqmodel", "llm-compressor")  # what their environment loads itself, it compares with the bf16 model


def run(job: Job) -> dict[str, Any]:
    """Quantize a model folder; embeddings and lm_head stay as they are. The same inputs give the same bytes.

    Reads:
        model: bf16 model folder. calibset: calibset.parquet (schemes that need calibration). scales_from: bf16 model
        folder on which AWQ's scales and clipping are searched (where it is not `model`).
    Writes:
        model*.safetensors, config.json, quantize_config.json; tokenizer files and generation_config.json byte for
        byte from `model`; quantize.json: backend, packer, kernel at load, loss, tokens and damping a layer, and what
        each attention and FFN lost and its largest activation; serve.json, serve.md.
    Metrics:
        loss by layer, in the order of the layers; error of attention and FFN by decoder layer.

    Raises:
        StageError: The scheme does not fit a layer; inf or NaN in what was written.
    """
    setup(job)
    params, events, model = job.params, job.events, job.inputs["model"].path
    scheme = Scheme.of(params, slug=job.slug)
    headers = _checked(model, scheme)
    clock = time.perf_counter()
    rows = _rows(job.inputs["calibset"].path) if scheme.needs_calibration else []
    options: dict[str, Any] = {"rows": rows, "params": params, "device": job.execution.device, "events": events}
    os.environ["TORCHDYNAMO_DISABLE"] = (
        "1"  # nothing is compiled here; bitsandbytes would import the compiler: 1 s, 48 MiB
    )
    backend = importlib.import_module(f"tasks.jobs.backends.{scheme.backend.replace('-', '_')}")
    with contextlib.ExitStack() as stack:
        if "scales_from" in job.inputs:
            stack.enter_context(scales_found_on(job.inputs["scales_from"].path, out=job.out, **options))
        done: Quantized = backend.quantize(model, job.out, **options)
    quantized = time.perf_counter()
    _keep_companions(model, job.out)
    _spell_rope(job.out / "config.json")
    _refuse_nan(job.out)
    write_serve_file(job.out, name=job.slug, model=model, scheme=scheme)
    seen = None
    if rows and scheme.backend in MEASURED:
        gc.collect()  # of the backend's model
        seen = block_errors.measure(headers, job.out, rows=rows, device=job.execution.device)
        if warning := seen.fp16_warning():
            events.note("activations", warning)
    blocks = block_errors.records(
        headers,
        seen=seen,
        weight_errors={one.name: one.weight_error for one in done.layers if one.weight_error is not None},
    )
    summary = {
        "params": params,
        "sequences": len(rows),
        "tokens": sum(map(len, rows)),
        "kernel": seen and seen.kernel,
        "error_tokens": seen.tokens if seen else 0,
        "stream_max": seen and seen.stream_max,
        "blocks": [asdict(one) for one in blocks],
        **done.as_dict(),
    }
    (job.out / "quantize.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    losses = [layer.loss for layer in done.layers if layer.loss is not None]
    for step, loss in enumerate(losses):
        events.metric("quantize/loss", loss, step=step)
    for block in blocks:
        error = block.output_error if block.output_error is not None else block.weight_error
        if error is not None:
            events.metric(f"quantize/error/{block.part}", error, step=block.layer)
    return {
        "backend": done.backend,
        "packer": done.packer,
        "kernel": seen and seen.kernel,
        "layers": len(done.layers),
        "weight_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
        "sequences": len(rows),
        "tokens": sum(map(len, rows)),
        "loss_sum": sum(losses),
        "quantize_s": round(quantized - clock, 2),
        "record_s": round(time.perf_counter() - quantized, 2),
    }


def _rows(calibset: Path) -> list[list[int]]:
    """Token ids of the sequences, in the order of the file."""
    import pyarrow.parquet as pq  # 39 MiB that schemes without rows do not need

    return pq.read_table(calibset / "calibset.parquet", columns=["input_ids"])["input_ids"].to_pylist()


def _checked(model: Path, scheme: Scheme) -> Headers:
    """The model's headers; StageError where a layer's shape does not allow the scheme, or the backend the model."""
    try:
        headers = read_headers(model)
        problems = [*scheme.check(headers.linears), *limit_problems(scheme, headers)]
    except RecipeError as error:
        raise StageError(error.problems[0]) from None
    if problems:
        raise StageError(problems[0])
    return headers


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


def _spell_rope(path: Path) -> None:
    """Engines that read with transformers 4 find the rotary embedding, too."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if older := older_spelling(config):
        path.write_text(json.dumps(config | older, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_nan(out: Path) -> None:
    """Raise StageError where a stored float (scales among them) is inf or NaN."""
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise StageError(
                        Problem(
                            what="a quantized weight holds inf or NaN",
                            where=name,
                            why="the input weight is not finite or too large for fp16 scales, or the Hessian "
                            "could not be factored",
                            next="check the merged model (quench evaluate); raise quantize.damp",
                        )
                    )
