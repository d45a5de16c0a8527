"""Job body: what one reader makes of quantized models: the weights of their layers and the logits of some rows.

It runs in the reader's own environment, so it imports nothing else than that one surely has. Weights are taken through
the reader's forward pass: a layer's output for the identity matrix is its weight, exactly, since every sum has one term
that is not zero.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.runtime.process.job import Job


def run(job: Job) -> dict[str, Any]:
    """Load every input but `rows` by `params["reader"]`, in fp16 on the CPU.

    Reads:
        rows: parquet with input_ids. Every other input: a quantized model folder.
    Writes:
        NAME/weights.safetensors: [in, out] fp16 of each quantized layer; NAME/logits.safetensors: [tokens, vocabulary]
        fp16 of each row, by its number.
    """
    torch.set_num_threads(job.execution.threads)
    rows = pq.read_table(job.inputs["rows"].path, columns=["input_ids"])["input_ids"].to_pylist()
    kernels = {}
    for name in job.inputs.keys() - {"rows"}:
        out = job.out / name
        out.mkdir()
        model = READERS[job.params["reader"]](job.inputs[name].path, out).eval()
        layers = {key: module for key, module in model.named_modules() if hasattr(module, "qweight")}
        with torch.inference_mode():
            save_file({str(i): _logits(model, row) for i, row in enumerate(rows)}, out / "logits.safetensors")
            save_file({key: _weight(layer) for key, layer in layers.items()}, out / "weights.safetensors")
        kernels[name] = "+".join(sorted({type(layer).__name__ for layer in layers.values()}))
    return {"kernels": kernels}


def _logits(model: nn.Module, row: list[int]) -> Tensor:
    return model(torch.tensor([row])).logits[0].half().contiguous()


def _weight(layer: Any) -> Tensor:
    if layer.bias is not None:
        layer.bias.zero_()
    inputs = getattr(layer, "in_features", None) or layer.infeatures  # AutoGPTQ's word
    return layer(torch.eye(inputs, dtype=torch.float16)[None])[0].contiguous()


def _transformers(folder: Path, scratch: Path) -> nn.Module:
    """By the kernels in plain torch, which dequantize in fp16."""
    from transformers import AwqConfig, GPTQConfig

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    kernels = {"awq": AwqConfig(backend="torch_awq"), "gptq": GPTQConfig(stored["bits"], backend="gptq_torch")}
    return _default(folder, scratch, quantization_config=kernels[stored["quant_method"]])


def _default(folder: Path, scratch: Path, **settings: Any) -> nn.Module:
    """By the kernel that is taken where nobody names one; for 4 bits on a CPU it rounds scales to bf16."""
    from tasks.jobs.loading.environment import tame_gptqmodel

    tame_gptqmodel()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, use_safetensors=True, device_map="cpu", **settings
    )


def _autoawq(folder: Path, scratch: Path) -> nn.Module:
    """By its plain torch path: on a CPU it would take the one of intel_extension_for_pytorch, else Triton's."""
    base: Any = importlib.import_module("awq.models.base")
    gemm: Any = importlib.import_module("awq.modules.linear.gemm")
    base.get_best_device = lambda: "plain torch"  # `cpu` asks for intel_extension_for_pytorch; used for nothing else
    gemm.TRITON_AVAILABLE = False
    auto: Any = importlib.import_module("awq").AutoAWQForCausalLM
    settings = {"fuse_layers": False, "trust_remote_code": False, "device_map": {"": "cpu"}}
    return auto.from_quantized(str(folder), **settings).model


def _auto_gptq(folder: Path, scratch: Path) -> nn.Module:
    """GPTQ files, and AWQ files repacked by its own code, which writes the result beside the model: so a copy is read.

    The repacking sends tensors to the GPU before its shifts, in plain torch: here they stay. Of a model with tied
    embeddings it takes the output layer from the file, where its own files have it a second time; without one it ties
    the embeddings to an output layer that nobody filled, in silence. So the copy gets one.
    """
    auto_gptq: Any = importlib.import_module("auto_gptq")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config["quantization_config"]
    copy = Path(shutil.copytree(folder, scratch / "model", copy_function=os.symlink))
    if config.get("tie_word_embeddings"):
        _untie(copy / "model.safetensors")
    settings: dict[str, Any] = {"device": "cpu", "disable_exllama": True, "disable_exllamav2": True}
    if quantization["quant_method"] == "awq":
        torch.Tensor.cuda = lambda tensor: tensor
        settings["quantize_config"] = auto_gptq.BaseQuantizeConfig(
            bits=quantization["bits"], group_size=quantization["group_size"], desc_act=False, awq_gemm_checkpoint=True
        )
    return auto_gptq.AutoGPTQForCausalLM.from_quantized(str(copy), **settings).model


def _untie(path: Path) -> None:
    tensors = load_file(path)
    path.unlink()  # the link
    output = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": output}, path, metadata={"format": "pt"})


READERS = {
    "transformers": _transformers,
    "transformers-default": _default,
    "autoawq": _autoawq,
    "auto-gptq": _auto_gptq,
}
