"""What quantization does to the attention and the FFN of each decoder layer, on calibration rows and on fresh loads.

Two forward passes: the bf16 model's, which keeps what every attention and FFN adds to the residual stream, and the
quantized model's, in which each of them is compared and then replaced by the kept one. So each sees the inputs that it
has in the bf16 model, and no layer's error contains another layer's. It works for every format that can be loaded.

The first pass also keeps the largest activation: a model that was trained in bf16 may go beyond fp16's 65,504, and
kernels that compute in fp16 (AutoAWQ's, ExLlamaV2's) overflow then.

On CUDA the bf16 model stays on the host, and each of its layers is on the GPU only while it computes: beside it, an 8B
would not fit a card that holds its 4 bits easily. What is kept of it lies on the host, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.models.headers import Headers
from tasks.jobs.backends import relative_error
from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.jobs.merging.streams import Reader
from tasks.runtime.host_memory import free_host_bytes
from tasks.runtime.process.errors import StageError

GIB = 1 << 30
TOKENS = 512  # eight such windows of the quickstart's rows, gptq-w4-g64: each block within 8 % of its mean
FP16_MAX = 65504.0
MARGIN = 4.0  # other prompts have larger activations than these tokens: fp16 is warned of from FP16_MAX / 4 on
Block = tuple[int, str]
_LAYER = re.compile(r"(?:^|\.)(\d+)$")  # a decoder layer itself
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.([^.]+)")  # layer number and what follows it: 3.self_attn


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """The attention or the FFN of one decoder layer.

    Attributes:
        layer: Number of the layer.
        part: Its name there: self_attn, mlp ...
        weight_std: Root mean square of the weights of its linear layers, before quantization.
        output_error: ||f(x) - fq(x)|| / ||f(x)|| on calibration rows; None where there were none.
        weight_error: ||W - Wq|| / ||W|| of its linear layers; None where the backend says nothing.
        activation_max: Largest |x| that enters or leaves one of its modules in the bf16 model, on the same rows.
    """

    layer: int
    part: str
    weight_std: float
    output_error: float | None = None
    weight_error: float | None = None
    activation_max: float | None = None


class Measured(NamedTuple):
    """What the two forward passes gave.

    Attributes:
        errors: Output error by (layer, part).
        kernel: Class of the quantized layers, as loaded.
        tokens: Tokens that were looked at.
        maxima: Largest |x| in the bf16 model by (layer, part).
        stream_max: Largest |x| that a decoder layer leaves in the residual stream.
    """

    errors: dict[Block, float]
    kernel: str
    tokens: int
    maxima: dict[Block, float]
    stream_max: float

    def fp16_warning(self) -> str | None:
        """What to say where fp16 may overflow; None where it has room."""
        block, largest = max(self.maxima.items(), key=itemgetter(1))
        where = f"{block[1]} of layer {block[0]}"
        if self.stream_max > largest:
            where, largest = "the residual stream", self.stream_max
        if largest <= FP16_MAX / MARGIN:
            return None
        return (
            f"up to {largest:,.0f} in {where} of the bf16 model on {self.tokens} calibration tokens; fp16 ends at "
            f"{FP16_MAX:,.0f}, and kernels that compute in it may overflow: serve in bfloat16, as serve.md says"
        )


def block_of(name: str) -> Block:
    """(3, "self_attn") of `model.layers.3.self_attn.q_proj`."""
    match = _BLOCK.search(name)
    assert match is not None  # names of linear layers inside decoder layers
    return int(match[1]), match[2]


def weight_squares(headers: Headers) -> dict[str, tuple[float, int]]:
    """Sum of squares and number of weights of every linear layer."""
    with Reader() as reader:
        reader.open(headers.tensors.values())
        tensors = {layer.name: headers.tensors[f"{layer.name}.weight"] for layer in headers.linears}
        return {
            name: (reader.read(tensor).float().square().sum().item(), tensor.numel) for name, tensor in tensors.items()
        }


def records(headers: Headers, *, measured: Measured | None, weight_errors: Mapping[str, float]) -> list[BlockRecord]:
    """One record per block, in the order of the layers.

    Args:
        headers: The bf16 model.
        measured: What the forward passes gave; None where there were none.
        weight_errors: ||W - Wq|| / ||W|| by linear layer; may be empty.
    """
    squares = weight_squares(headers)
    blocks: dict[Block, list[str]] = {}
    for name in squares:
        blocks.setdefault(block_of(name), []).append(name)
    blocks_in_order: list[BlockRecord] = []
    for (layer, part), names in sorted(blocks.items()):
        total = sum(squares[name][0] for name in names)
        errors = [weight_errors[name] ** 2 * squares[name][0] for name in names if name in weight_errors]
        blocks_in_order.append(
            BlockRecord(
                layer=layer,
                part=part,
                weight_std=(total / sum(squares[name][1] for name in names)) ** 0.5,
                output_error=measured.errors.get((layer, part)) if measured else None,
                weight_error=(sum(errors) / total) ** 0.5 if len(errors) == len(names) and total else None,
                activation_max=measured.maxima.get((layer, part)) if measured else None,
            )
        )
    return blocks_in_order


@torch.inference_mode()
def measure(headers: Headers, quantized: Path, *, rows: Sequence[Sequence[int]], device: str) -> Measured:
    """Load both, and compare them block by block on the first tokens of the rows, joined.

    Args:
        headers: The bf16 model.
        quantized: What was made of it.
        rows: Token ids.
        device: `cpu` or `cuda`.

    Raises:
        StageError: One of the two does not load.
    """
    stream = islice(chain.from_iterable(rows), min(TOKENS, headers.max_positions or TOKENS))
    tokens = torch.tensor([list(stream)], device=device)
    blocks = {block_of(layer.name) for layer in headers.linears}
    kept: dict[Block, Tensor] = {}
    errors: dict[Block, float] = {}

    def keep(block: Block, output: Tensor) -> Tensor:
        kept[block] = output.cpu()
        return output

    def compare(block: Block, output: Tensor) -> Tensor:
        original_output = kept.pop(block).to(output.device)
        errors[block] = relative_error(original_output, output)
        return original_output

    original = _from_the_host(headers, device=device)
    _hook(original, blocks, keep)
    maxima = _watch_maxima(original, blocks)
    original(tokens, use_cache=False)
    del original
    loaded = load_arm("quantized", quantized, device=device)
    _hook(loaded, blocks, compare)
    loaded(tokens, use_cache=False)
    stream_max = maxima.pop(None, 0.0)
    largest = {block: value for block, value in maxima.items() if block}
    return Measured(errors, kernel_of(loaded), tokens.numel(), largest, stream_max)


def _from_the_host(headers: Headers, *, device: str) -> nn.Module:
    """The bf16 model on the host, whose layers visit the device one at a time.

    Raises:
        StageError: The host has no room for it (a process that takes more would be killed, and its result with it);
            no safetensors.
    """
    needed = 2 * headers.parameters
    free = free_host_bytes()
    if device != "cpu" and needed > free:
        raise StageError.of(
            what="the bf16 model does not fit the host beside what is there",
            where=str(headers.folder),
            why=f"it takes {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free",
            next="quantize on a machine with more memory, if you want the errors by layer",
        )
    model = load_bf16(headers.folder, device="cpu")
    return model if device == "cpu" else visiting(model, torch.device(device))


def visiting(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, whose weights are on the device only while their own layer computes."""
    from accelerate import cpu_offload

    return cpu_offload(model, device)


def _watch_maxima(model: nn.Module, blocks: set[Block]) -> dict[Block | None, float]:
    """Largest |x| by block, None for the residual stream behind each decoder layer; forward passes fill it."""
    maxima: dict[Block | None, float] = {}
    numbers = {number for number, _ in blocks}

    def watch(module: nn.Module, place: Block | None) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for value in [output, *args] if place else [output]:
                tensor = value[0] if isinstance(value, tuple) else value
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    maxima[place] = max(maxima.get(place, 0.0), tensor.abs().max().item())

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        layer = _LAYER.search(name)
        if _BLOCK.search(name) and block_of(name) in blocks and not any(module.children()):
            watch(module, block_of(name))
        elif layer and not _BLOCK.search(name) and int(layer[1]) in numbers:
            watch(module, None)
    return maxima


def _hook(model: nn.Module, blocks: set[Block], replace: Callable[[Block, Tensor], Tensor]) -> None:
    """`replace` gets what every block adds to the residual stream, and returns what is added in its place."""
    for name, module in model.named_modules():
        match = _BLOCK.search(name)
        if match and match.end() == len(name) and block_of(name) in blocks:
            module.register_forward_hook(_replacing(block_of(name), replace))


def _replacing(block: Block, replace: Callable[[Block, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (replace(block, output[0]), *output[1:]) if isinstance(output, tuple) else replace(block, output)

    return hook
