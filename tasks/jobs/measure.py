"""Load time, memory and tokens/s of one arm, alone on the machine."""

from __future__ import annotations

import gc
import resource
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import load_arm, setup
from tasks.jobs.measuring.tiles import Model, last_only, read_in_rows
from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.runtime.process.job import Job

BIG_BYTES = 2 << 30  # above this a load takes long: it is timed once


def run(job: Job) -> dict[str, Any]:
    """Time loading, prefill and greedy decoding with a KV cache: the model alone, no server.

    Reads:
        model: folder. adapter: PEFT folder (optional). dataset: real tokens for the prompt.
    Writes:
        speed.json: load_s, prefill_tokens_per_s, decode_tokens_per_s (one value per repeat), resident_bytes,
        peak_rss_gib (peak_gpu_gib on CUDA), kernel, serving_kernel, device, threads, batch, context, new_tokens.
    Metrics:
        The medians.

    Raises:
        StageError: The arm does not load.
    """
    setup(job)
    params, device = job.params, job.execution.device
    model, loads = _load(job)
    read_in_rows(model)
    own = job.inputs["model"].path if params["kind"] == "external" else None
    ids = _prompt(job.inputs["dataset"].path, params["batch"], params["prompt_tokens"], own=own).to(device)
    timings = []
    for repeat in range(params["repeats"] + 1):  # the first is not counted
        timings.append(_time_once(model, ids, params["new_tokens"], device=device))
        job.events.progress(repeat, params["repeats"], unit="repeat")
    kernel = kernel_of(model)
    serving = device == "cuda" and "Torch" not in kernel  # GPTQModel's Torch* layers dequantize, then multiply
    job.events.note("kernel", f"{kernel} on {device}{'' if serving else ': not a serving kernel'}")
    speed = {
        "load_s": loads,
        "prefill_tokens_per_s": [ids.numel() / timing.prefill_s for timing in timings[1:]],
        "decode_tokens_per_s": [
            params["batch"] * (params["new_tokens"] - 1) / timing.decode_s for timing in timings[1:]
        ],
        **_memory(model, device),
        "kernel": kernel,
        "serving_kernel": serving,
        "device": device,
        "threads": torch.get_num_threads(),
        "batch": params["batch"],
        "context": params["prompt_tokens"],
        "new_tokens": params["new_tokens"],
    }
    job.write_json("speed.json", speed)
    medians = {name: median(speed[name]) for name in ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s")}
    for name, value in medians.items():
        job.events.metric(name, value)
    return {"kernel": kernel, "repeats": params["repeats"], **medians}


class _TimedLoads(NamedTuple):
    model: Model
    seconds: list[float]


def _load(job: Job) -> _TimedLoads:
    """The arm, and the seconds of every load after the first, which imports the backend and fills the file cache."""
    folder, device = job.inputs["model"].path, job.execution.device
    repeats = job.params["repeats"]

    def load() -> Model:
        trusted = job.params.get("trust_remote_code", False)
        return load_arm(job.params["kind"], folder, adapter=job.optional("adapter"), device=device, trusted=trusted)

    if sum(path.stat().st_size for path in folder.glob("*.safetensors")) > BIG_BYTES:
        repeats = 1
        job.events.note("load_s", f"timed once: the model is larger than {BIG_BYTES >> 30} GiB")
    model = load()
    gc.freeze()  # GPTQModel collects garbage at the end of a load: 0.6 s over imported modules, no part of loading
    seconds = []
    for _ in range(repeats):
        del model
        gc.collect()
        clock = _now(device)
        model = load()
        seconds.append(_now(device) - clock)
    return _TimedLoads(model, seconds)


def _prompt(dataset: Path, batch: int, length: int, *, own: Path | None = None) -> Tensor:
    """[batch, length] token ids: rows of the dataset, one after the other, from the start again where they end.

    Args:
        dataset: The dataset.
        batch: Sequences.
        length: Tokens per sequence.
        own: Model folder whose own tokenizer reads the same text.
    """
    ids: list[int] = []
    with pq.ParquetFile(dataset / "rows.parquet") as file:
        for rows in file.iter_batches(columns=["input_ids"]):
            ids += rows["input_ids"].flatten()[: batch * length - len(ids)].to_pylist()
            if len(ids) == batch * length:
                break
    if own is not None:
        text = load_tokenizer(dataset / "tokenizer").decode(ids, skip_special_tokens=True)
        ids = load_tokenizer(own)(text, add_special_tokens=False)["input_ids"]
    stream = torch.tensor(ids)
    return stream.repeat(-(-batch * length // len(stream)))[: batch * length].view(batch, length)


class _Timing(NamedTuple):
    prefill_s: float
    decode_s: float


@torch.inference_mode()
def _time_once(model: Model, ids: Tensor, new_tokens: int, *, device: str) -> _Timing:
    """Seconds of the prefill, which gives the first token, and of the new_tokens - 1 steps after it; ends ignored."""
    last = last_only(model)
    start = _now(device)
    out = model(input_ids=ids, use_cache=True, **last)
    token = out.logits[:, -1:].argmax(-1)
    middle = _now(device)
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return _Timing(middle - start, _now(device) - middle)


def _now(device: str) -> float:
    """The clock, after the GPU has finished its queue."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(model: Model, device: str) -> dict[str, float]:
    """Peak memory of the process, and bytes of the loaded weights: NF4 keeps its scales outside its buffers."""
    tensors = (*model.parameters(), *model.buffers(), *model.state_dict().values())
    memory: dict[str, float] = {
        "resident_bytes": sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
    }
    if device == "cuda":
        memory["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / (1 << 30)
    return memory
