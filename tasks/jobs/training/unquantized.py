"""How much of a base stays bf16 after NF4 loading.

transformers 5 fuses a mixture's experts into 3-D parameters, which bitsandbytes passes over: QLoRA then holds most of
the model at 2 bytes per weight, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from tasks.jobs.loading.classes import text_decoder
from tasks.jobs.loading.load import linear4bit
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

LIMIT = 0.05  # a router or a small head may stay; experts are above 80 % of a mixture model
GIB = 1 << 30


class Unquantized(NamedTuple):
    """Matrices that stayed bf16, without embeddings and output layer.

    Attributes:
        share: Of the weights of matrices in the text decoder.
        gib: Of those.
        largest: The largest one's name.
        towers_gib: Of matrices (and kernels of convolutions) outside the text decoder: towers and projectors, which
            stay bf16 on purpose.
    """

    share: float
    gib: float
    largest: str
    towers_gib: float


def unquantized(model: PreTrainedModel) -> Unquantized:
    """Count the weights of matrices that are not 4-bit."""
    quantized = linear4bit(model)
    left_out = {id(p) for layer in quantized.values() for p in layer.parameters()}
    left_out |= {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = model.get_output_embeddings()
    left_out |= {id(p) for p in head.parameters()} if head is not None else set()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in left_out}
    stem = text_decoder(model)
    inside = {name: p for name, p in matrices.items() if not stem or name.startswith(f"{stem}.")}
    weights = sum(p.numel() for p in inside.values())
    every = weights + sum(layer.in_features * layer.out_features for layer in quantized.values())
    return Unquantized(
        share=weights / every if every else 0.0,
        gib=_gib(inside),
        largest=max(inside, key=lambda name: inside[name].numel(), default=""),
        towers_gib=_gib(matrices) - _gib(inside),
    )


def _gib(matrices: Mapping[str, torch.Tensor]) -> float:
    return sum(p.numel() * p.element_size() for p in matrices.values()) / GIB


def check_unquantized(model: PreTrainedModel, job: Job) -> None:
    """Note how much stayed bf16; refuse more than 5 % of the text decoder unless the recipe accepts it.

    Raises:
        StageError: More than 5 % of the linear weights, and `train.accept_unquantized` is false.
    """
    rest = unquantized(model)
    share = f"{100 * rest.share:.1f} % of the linear weights stay bf16: {rest.gib:.3f} GiB"
    if rest.share:
        job.events.note("unquantized", f"{share}, the largest is {rest.largest}")
    if rest.towers_gib:
        job.events.note(
            "towers",
            f"the text decoder is trained; what is outside it stays as it is, in bf16: {rest.towers_gib:.3f} GiB",
        )
    if rest.share > LIMIT and not job.params["accept_unquantized"]:
        raise StageError.of(
            what=share,
            where=f"the base, {rest.largest}",
            why="bitsandbytes quantizes linear layers only; transformers holds a mixture's experts as 3-D "
            "parameters, so they keep 2 bytes per weight",
            next="set train.accept_unquantized: true if that memory is there, or take a dense base",
        )
