"""Which kernel multiplies the weights of a quantized checkpoint: chosen before it is loaded, read from it after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from recipes.schemes.scheme import PER_CHANNEL

Note = Callable[[str, str], None]  # what about, and the text


def choose_kernel(stored: dict[str, Any], *, device: str, note: Note) -> str | None:
    """GPTQModel's kernel for a checkpoint, in transformers' words; None leaves the choice to it.

    On CUDA its first choices are Machete (Hopper) and Swordfish (Blackwell), which fetch CUTLASS from the net and end
    in an error without it. Marlin compiles from what is installed, once per machine, given nvcc and a C++ compiler;
    where it cannot, plain torch needs neither. On CPUs, for 4 bits per channel, its choice would be a kernel that reads
    no zero points and ends in an error where a layer has inputs other than 32, 64, 128 or 256 (TorchFusedLinear).

    Args:
        stored: quantization_config of the checkpoint.
        device: `cpu` or `cuda`.
        note: Called where Marlin would fit and is not there.
    """
    gptq, group = stored["quant_method"] == "gptq", stored.get("group_size")
    if device == "cpu":
        return "gptq_torch" if gptq and group == PER_CHANNEL and stored["bits"] == 4 else None
    if not gptq and stored.get("format", stored.get("version", "gemm")) != "gemm":
        return None  # an external model's: layouts that have one kernel each
    symmetric = not gptq or stored.get("sym", True)  # its AWQ layers read zero points
    fits = stored.get("bits") in (4, 8) and group in (PER_CHANNEL, 32, 64, 128) and symmetric
    if fits:
        missing = _no_marlin()
        if missing is None:
            return "gptq_marlin" if gptq else "marlin"
        note("kernel", f"{missing}, so these layers run in plain torch, and slower")
    return "gptq_torch" if gptq else "torch_awq"


def _no_marlin() -> str | None:
    """Why Marlin does not run here; where its extensions are not there yet, they are compiled.

    Both types: bf16 multiplies, fp16 packs, because the layers are made before transformers says which type they have.
    """
    if torch.cuda.get_device_capability() < (8, 0):
        return "Marlin takes a GPU of compute capability 8.0"
    from gptqmodel.utils.marlin import marlin_runtime_available, marlin_runtime_error

    print("kernel: Marlin is compiled at its first use on a machine, for about 5 minutes", flush=True)
    for dtype in (torch.bfloat16, torch.float16):
        if not marlin_runtime_available(dtype):
            return f"Marlin does not compile here ({marlin_runtime_error(dtype).partition(chr(10))[0]})"
    return None


def kernel_of(model: nn.Module) -> str:
    """Class names of the quantized linear layers in use, joined by `+`; `Linear` for an unquantized model."""
    names = {type(module).__name__ for module in model.modules() if _is_quantized_layer(module)}
    if any(isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme") for module in model.modules()):
        names.add("Linear (unpacked from compressed-tensors)")
    return "+".join(sorted(names)) or "Linear"


def _is_quantized_layer(module: nn.Module) -> bool:
    """By the base class's name, because importing gptqmodel to ask costs 8-21 s."""
    return any(
        (base.__name__, base.__module__.partition(".")[0])
        in {
            ("Linear4bit", "bitsandbytes"),
            ("Linear8bitLt", "bitsandbytes"),
            ("BaseQuantLinear", "gptqmodel"),
        }
        for base in type(module).__mro__
    )
