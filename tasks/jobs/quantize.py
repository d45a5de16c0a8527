"""bf16 model -> quantized model that loads in plain transformers, by one scheme."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from recipes.headers import read_headers
from recipes.problem import Problem, RecipeError
from recipes.schemes import Scheme
from tasks.jobs.backends import TOKENIZER_FILES, Quantized, gptqmodel, rtn
from tasks.jobs.backends.load import setup
from tasks.runtime.errors import StageError
from tasks.runtime.job import Job

WEIGHTS = ("config.json", "quantize_config.json", "*.safetensors", "*.safetensors.index.json")
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")


def run(job: Job) -> dict[str, Any]:
    """Quantize a model folder; embeddings and lm_head stay as they are. The same inputs give the same bytes.

    Reads:
        model: bf16 model folder. calibset: calibset.parquet (GPTQ and AWQ).
    Writes:
        model*.safetensors, config.json, quantize_config.json; tokenizer files and generation_config.json byte for
        byte from `model`; quantize.json: backend, packer, and loss, tokens and damping a layer.
    Metrics:
        loss by layer, in the order of the layers.

    Raises:
        StageError: The scheme does not fit a layer; inf or NaN in what was written.
    """
    setup(job)
    params, events, model = job.params, job.events, job.inputs["model"].path
    _refuse_shapes(model, params, slug=job.slug)
    started = time.perf_counter()
    rows = [] if params["method"] == "rtn" else _rows(job.inputs["calibset"].path)
    if params["method"] == "rtn":
        done = rtn.quantize(model, job.out, params=params, events=events)
    else:
        done = gptqmodel.quantize(model, job.out, rows=rows, params=params, device=job.execution.device, events=events)
    seconds = time.perf_counter() - started
    _keep_companions(model, job.out)
    _refuse_nan(job.out)
    summary = {"params": params, "sequences": len(rows), "tokens": sum(map(len, rows)), **done.as_dict()}
    (job.out / "quantize.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    losses = [layer.loss for layer in done.layers if layer.loss is not None]
    for step, loss in enumerate(losses):
        events.metric("quantize/loss", loss, step=step)
    return {
        **_result(done, job.out),
        "sequences": len(rows),
        "tokens": sum(map(len, rows)),
        "loss_sum": sum(losses),
        "quantize_s": round(seconds, 2),
    }


def _result(done: Quantized, out: Path) -> dict[str, Any]:
    return {
        "backend": done.backend,
        "packer": done.packer,
        "layers": len(done.layers),
        "weight_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }


def _rows(calibset: Path) -> list[list[int]]:
    """Token ids of the sequences, in the order of the file."""
    return pq.read_table(calibset / "calibset.parquet", columns=["input_ids"])["input_ids"].to_pylist()


def _refuse_shapes(model: Path, params: dict[str, Any], *, slug: str) -> None:
    """Raise StageError where the group does not divide a layer's inputs or its outputs cannot be packed."""
    try:
        problems = Scheme.of(params, slug=slug).check(read_headers(model).linears)
    except RecipeError as error:
        problems = list(error.problems)
    if problems:
        raise StageError(problems[0])


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
    for name in COMPANIONS:
        if (model / name).exists():
            shutil.copyfile(model / name, out / name)
    if (model / "chat_templates").is_dir():
        shutil.copytree(model / "chat_templates", out / "chat_templates")


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
