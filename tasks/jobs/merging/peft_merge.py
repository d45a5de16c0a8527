"""What the stream cannot do exactly: PEFT's own merge, on the whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tasks.jobs.loading.load import attach, linear4bit, load_bf16, load_nf4
from tasks.jobs.merging.streams import SHARD
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def merge_by_peft(job: Job, why: str) -> dict[str, Any]:
    """Merge with PEFT and save weights and config.

    Raises:
        StageError: PEFT cannot do it either.
    """
    base, adapter = job.inputs["base"].path, job.inputs["adapter"].path
    device = job.execution.device
    dequantized = job.params["onto"] == "dequantized"
    model = load_dequantized(base, device=device) if dequantized else load_bf16(base, device=device)
    parameters = model.num_parameters()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    job.events.note("merge", f"by PEFT, with the whole model in memory, not as a stream: {why}")
    try:
        merged: Any = attach(model, adapter).merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise StageError.of(
            what=f"PEFT cannot merge this adapter: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=str(adapter),
            why=f"the streamed merge cannot either: {why}",
            next="merge it into the base that it was trained on; if it is that one, serve it as an adapter",
        ) from error
    for name, parameter in merged.named_parameters():  # some kinds leave fp32 where the base had bf16
        parameter.data = parameter.data.to(dtypes.get(name, torch.bfloat16))
    merged.save_pretrained(job.out, max_shard_size=SHARD)
    return {"parameters": parameters}


def load_dequantized(folder: Path, *, device: str) -> PreTrainedModel:
    """The base as NF4 makes it, in bf16 layers.

    bitsandbytes turns Conv1D into Linear, and transformers leaves it so when it dequantizes: put back, transposed.
    """
    model = load_nf4(folder, device=device)
    conv = [name for name, layer in linear4bit(model).items() if layer.source_cls is Conv1D]
    model: Any = model.dequantize()
    for name in conv:
        linear: nn.Linear = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = nn.Parameter(linear.weight.data.T.contiguous(), requires_grad=False)
        layer.bias = nn.Parameter(linear.bias.data.to(torch.bfloat16), requires_grad=False)
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = False  # PEFT asks it, and transformers leaves it
    return model.eval()
