"""What quantization does to the attention and the FFN of each decoder layer, on calibration rows and on fresh loads.

Two forward passes: the bf16 model's, which keeps what every attention and FFN adds to the residual stream, and the
quantized model's, in which each of them is compared and then replaced by the kept one. So each sees the inputs that it
has in the bf16 model, and no error stands for another layer's. It needs no format's arithmetic: what is loaded counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.headers import Headers
from tasks.jobs.backends import relative_error
from tasks.jobs.backends.load import kernel_of, load_arm, load_bf16
from tasks.jobs.streams import Reader

TOKENS = 512  # eight such windows of the quickstart's rows, gptq-w4-g64: each block within 8 % of its mean
Block = tuple[int, str]
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
    """

    layer: int
    part: str
    weight_std: float
    output_error: float | None = None
    weight_error: float | None = None


class Measured(NamedTuple):
    """What the two forward passes gave.

    Attributes:
        errors: Output error by (layer, part).
        kernel: Class of the quantized layers, as loaded.
        tokens: Tokens that were looked at.
    """

    errors: dict[Block, float]
    kernel: str
    tokens: int


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
        return {name: (reader.read(one).float().square().sum().item(), one.numel) for name, one in tensors.items()}


def records(
    headers: Headers, *, errors: Mapping[Block, float], weight_errors: Mapping[str, float]
) -> list[BlockRecord]:
    """One record a block, in the order of the layers.

    Args:
        headers: The bf16 model.
        errors: Output error by block; may be empty.
        weight_errors: ||W - Wq|| / ||W|| by linear layer; may be empty.
    """
    squares = weight_squares(headers)
    blocks: dict[Block, list[str]] = {}
    for name in squares:
        blocks.setdefault(block_of(name), []).append(name)
    found: list[BlockRecord] = []
    for (layer, part), names in sorted(blocks.items()):
        total = sum(squares[name][0] for name in names)
        lost = [weight_errors[name] ** 2 * squares[name][0] for name in names if name in weight_errors]
        found.append(
            BlockRecord(
                layer=layer,
                part=part,
                weight_std=(total / sum(squares[name][1] for name in names)) ** 0.5,
                output_error=errors.get((layer, part)),
                weight_error=(sum(lost) / total) ** 0.5 if len(lost) == len(names) and total else None,
            )
        )
    return found


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
        kept[block] = output
        return output

    def compare(block: Block, output: Tensor) -> Tensor:
        wanted = kept.pop(block)
        errors[block] = relative_error(wanted, output)
        return wanted

    original = load_bf16(headers.folder, device=device)
    _hook(original, blocks, keep)
    original(tokens, use_cache=False)
    del original
    loaded = load_arm("quantized", quantized, device=device)
    _hook(loaded, blocks, compare)
    loaded(tokens, use_cache=False)
    return Measured(errors, kernel_of(loaded), tokens.numel())


def _hook(model: nn.Module, blocks: set[Block], see: Callable[[Block, Tensor], Tensor]) -> None:
    """`see` gets what every block adds to the residual stream, and gives what is added in its place."""
    for name, module in model.named_modules():
        match = _BLOCK.search(name)
        if match and match.end() == len(name) and block_of(name) in blocks:
            module.register_forward_hook(_replacing(block_of(name), see))


def _replacing(block: Block, see: Callable[[Block, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (see(block, output[0]), *output[1:]) if isinstance(output, tuple) else see(block, output)

    return hook
