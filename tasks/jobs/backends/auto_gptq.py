"""GPTQ by AutoGPTQ 0.7.1, the archived original, in the environment `autogptq`; on CPU and CUDA.

It asks for CUDA before it quantizes, although its arithmetic is plain torch. On a machine without a GPU the question is
passed over and layers stay where they are (`_stay_on_cpu`); a note says so.

What it does without saying so: it sets weights to zero whose input was zero in all calibration tokens, and asymmetric
zero points of 0 are packed as -1, which corrupts the packed words that hold them.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tasks.jobs.backends import LayerRecord, Quantized, Request, linear_names, unpadded
from tasks.jobs.backends.archived import note_habits, read_config, refuse_overflow, write_checkpoint
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.events import Events

LOSS = "avg loss: "  # AutoGPTQ reports a layer's loss nowhere but in its log


def quantize(request: Request) -> Quantized:
    """Quantize and save in GPTQ's v1 layout.

    Raises:
        StageError: A weight does not fit fp16; a zero point cannot be packed.
    """
    model, params, events = request.model, request.params, request.events
    auto_gptq: Any = importlib.import_module("auto_gptq")
    modeling: Any = importlib.import_module("auto_gptq.modeling")
    if request.device == "cpu":
        _stay_on_cpu(modeling)
        events.note("device", "AutoGPTQ asks for CUDA to quantize; that is passed over: the same arithmetic on the CPU")
    quantize_config = auto_gptq.BaseQuantizeConfig(
        bits=params["bits"],
        group_size=params["group_size"],
        sym=params["symmetric"],
        desc_act=params["desc_act"],
        damp_percent=params["damp"],
    )
    config = read_config(model)
    auto: Any = AutoModelForCausalLM  # transformers 4.44 here: another signature than the main environment's
    loaded = auto.from_pretrained(
        str(model), config=config, torch_dtype=torch.float16, local_files_only=True, use_safetensors=True
    ).eval()
    refuse_overflow(loaded)
    for name, module in loaded.named_modules():
        if name.endswith("rotary_emb"):
            module.to(request.device)  # newer than AutoGPTQ: it moves embeddings and layers alone
    wrapped = modeling.GPTQ_CAUSAL_LM_MODEL_MAP[config.model_type](loaded, False, quantize_config)
    names = linear_names(model)
    layers: list[LayerRecord] = []
    _record(modeling, loaded, layers, total=len(names), damp=params["damp"], events=events)
    wrapped.quantize(unpadded(request.rows), batch_size=1)
    write_checkpoint(request, loaded.state_dict(), quantization=_quantization(params))
    layers.sort(key=lambda layer: names.index(layer.name))  # it begins each decoder layer with k_proj
    note_habits(model, layers, tokens=request.tokens, events=events)
    kinds = {type(module).__module__.rpartition(".")[2] for module in loaded.modules() if hasattr(module, "QUANT_TYPE")}
    return Quantized(backend=f"auto-gptq:{auto_gptq.__version__}", packer="+".join(sorted(kinds)), layers=layers)


def _quantization(params: dict[str, Any]) -> dict[str, Any]:
    """As AutoGPTQ writes it, without its paths, and with what GPTQModel and transformers ask for."""
    return {
        "bits": params["bits"],
        "group_size": params["group_size"],
        "damp_percent": params["damp"],
        "desc_act": params["desc_act"],
        "static_groups": False,
        "sym": params["symmetric"],
        "true_sequential": True,
        "is_marlin_format": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }


def _stay_on_cpu(modeling: Any) -> None:
    """It sends each decoder layer to `CUDA_0` and, after each linear layer, waits for the GPU."""
    modeling._base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None


def _record(
    modeling: Any, model: nn.Module, layers: list[LayerRecord], *, total: int, damp: float, events: Events
) -> None:
    """Put a class of ours in the place of its GPTQ: the same, with tokens, losses and progress written down.

    The loss is AutoGPTQ's: the sum over the layer's weights of (w - q)^2 / (2 d^2), d of the inverse Hessian's Cholesky
    factor, a calibration sequence.
    """
    names = {module: name for name, module in model.named_modules()}
    losses = _LossReader()
    log = logging.getLogger("auto_gptq.quantization.gptq")
    log.addHandler(losses)
    log.setLevel(logging.INFO)
    base: Any = modeling._base.GPTQ

    class GptqRecorder(base):
        tokens = 0

        def add_batch(self, inp: Tensor, out: Tensor) -> None:
            self.tokens += inp.numel() // inp.shape[-1]
            super().add_batch(inp, out)

        def fasterquant(self, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
            name = names[self.layer]
            if dead := int((self.H.diagonal() == 0).sum()):
                events.note("dead inputs", f"{name}: {dead} inputs were always zero; their weights are set to zero")
            scale, zero, g_idx = super().fasterquant(**settings)
            if (zero <= 0).any():
                raise _unpackable(name)
            layers.append(LayerRecord(name=name, loss=losses.last, tokens=self.tokens, damp=damp))
            events.progress(len(layers), total, unit="layer")
            return scale, zero, g_idx

    modeling._base.GPTQ = GptqRecorder


class _LossReader(logging.Handler):
    """Keeps the last loss that it logged."""

    last: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(LOSS):
            self.last = float(message.removeprefix(LOSS))


def _unpackable(name: str) -> StageError:
    return StageError.of(
        what="a zero point of 0 cannot be packed",
        where=name,
        why="all weights of a group are positive; GPTQ's v1 files store zero points less one, and AutoGPTQ writes the "
        "-1 over its neighbours",
        next="take the symmetric scheme (without -asym), or leave the backend out: GPTQModel packs it",
    )
