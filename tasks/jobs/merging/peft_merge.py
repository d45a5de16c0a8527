"""What the stream cannot do exactly: PEFT's own merge, on the whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tasks.jobs.loading.load import attach, linear4bit, load_bf16, load_nf4
from tasks.jobs.merging.embeddings import new_config
from tasks.jobs.merging.nf4_record import Records
from tasks.jobs.merging.streams import SHARD
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def merge_by_peft(job: Job, why: str, config: Mapping[str, Any], *, records: Records) -> dict[str, Any]:
    """Merge with PEFT and save weights and config.

    Args:
        job: Of the merge.
        why: The stream cannot do it.
        config: The base's config.json.
        records: The adapter's record of the NF4 base that it was trained on.

    Raises:
        StageError: PEFT cannot do it either, or the NF4 base is another.
    """
    base, adapter = job.inputs["base"].path, job.inputs["adapter"].path
    device = job.execution.device
    dequantized = job.params["onto"] == "dequantized"
    model = load_dequantized(base, device=device, records=records) if dequantized else load_bf16(base, device=device)
    comparison = records.conclude(job) if dequantized else {"record": "not needed"}
    parameters = model.num_parameters()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    job.events.note("merge", f"by PEFT, with the whole model in memory, not as a stream: {why}")
    try:
        attached: Any = attach(model, adapter)
        part_embeddings(model)
        merged: Any = attached.merge_and_unload(safe_merge=True)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise StageError.of(
            what=f"PEFT cannot merge this adapter: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=str(adapter),
            why=f"the streamed merge cannot either: {why}",
            next="merge it into the base that it was trained on; if it is that one, serve it as an adapter",
        ) from error
    for name, parameter in merged.named_parameters():  # some kinds leave fp32 where the base had bf16
        parameter.data = parameter.data.to(dtypes.get(name, torch.bfloat16))
    tied = tie_equal_embeddings(merged)
    merged.save_pretrained(job.out, max_shard_size=SHARD)
    job.write_json("config.json", new_config(config, tied=tied))
    return {**comparison, "parameters": parameters}


def part_embeddings(model: PreTrainedModel) -> None:
    """Give the output layer weights of its own: PEFT adds what changes one side of a tied pair to both.

    To be called when the adapter is attached: PEFT goes by config.json for what it lets both sides have.
    """
    sides = [_base_layer(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    if sides[1] is not None and sides[0].weight is sides[1].weight:
        sides[1].weight = nn.Parameter(sides[1].weight.detach().clone(), requires_grad=False)


def tie_equal_embeddings(model: PreTrainedModel) -> bool:
    """Tie input embeddings and output layer of a merged model where they were tied and are equal; True if tied now."""
    first: Any = model.get_input_embeddings()
    last: Any = model.get_output_embeddings()
    if not model.all_tied_weights_keys or last is None:
        return False
    if torch.equal(first.weight.to(torch.bfloat16), last.weight.to(torch.bfloat16)):
        last.weight = first.weight
        return True
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return False


def _base_layer(module: nn.Module | None) -> Any:
    """A module without what PEFT puts around it."""
    if module is None:
        return None
    wrapped: Any = getattr(module, "original_module", None) or module
    return wrapped.get_base_layer() if hasattr(wrapped, "get_base_layer") else wrapped


def load_dequantized(folder: Path, *, device: str, records: Records | None = None) -> PreTrainedModel:
    """The base as NF4 makes it, in bf16 layers.

    bitsandbytes turns Conv1D into Linear, and transformers leaves it so when it dequantizes: put back, transposed.
    """
    model = load_nf4(folder, device=device)
    if records is not None:
        records.judge_model(model)
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
