"""NF4 and int8 of a finished model through bitsandbytes and transformers, saved so that what loads is what was written.

Neither looks at data. NF4 is that of QLoRA, with double quantization (Dettmers et al. 2023, arXiv:2305.14314); int8 is
LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): a scale per output, and inputs beyond 6.0 are multiplied in fp16.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor

from recipes.models.headers import read_headers
from tasks.jobs.backends import LayerRecord, Quantized, Request, note_skipped, relative_error
from tasks.jobs.loading.classes import empty_model
from tasks.jobs.loading.cpu_nf4 import note_other_scales
from tasks.jobs.loading.load import load_int8, load_nf4
from tasks.jobs.loading.names import modules_of
from tasks.jobs.merging.streams import Reader


def quantize(request: Request) -> Quantized:
    """Quantize every linear layer but lm_head, and save."""
    params, events = request.params, request.events
    loaded = (load_nf4 if params["method"] == "nf4" else load_int8)(request.model, device=request.device)
    note_other_scales(loaded, events.note)
    loaded.save_pretrained(request.out)
    headers = read_headers(request.model)
    packed = {name: module for name, module in loaded.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    names = modules_of(empty_model(request.model), [layer.name for layer in headers.linears])
    modules = {name: packed[module] for name, module in names.items() if module in packed}
    records: list[LayerRecord] = []
    with Reader() as reader:
        reader.open(headers.tensors.values())
        for name in [layer.name for layer in headers.linears if layer.name in modules]:  # in the checkpoint's order
            original = reader.whole(headers.tensors[f"{name}.weight"])
            error = relative_error(original, dequantized(modules[name]).cpu())
            records.append(LayerRecord(name=name, weight_error=error))
            events.progress(len(records), len(modules), unit="layer")
    note_skipped((layer.name for layer in headers.linears), modules, events=events)
    if params["method"] == "int8":
        events.note("int8", "bitsandbytes casts the inputs of its int8 layers from bf16 to fp16 at run time")
    kind = type(next(iter(packed.values()))).__name__
    return Quantized(backend=f"bitsandbytes:{version('bitsandbytes')}", packer=kind, layers=records)


def dequantized(layer: Linear4bit | Linear8bitLt) -> Tensor:
    """[out, in]: the dequantized weight of a layer, in bf16 (NF4) or fp32 (int8: code x scale / 127)."""
    weight: Any = layer.weight  # Params4bit or Int8Params, whose state no stub names
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.data.to(torch.float32) * (weight.SCB / 127).unsqueeze(-1)
