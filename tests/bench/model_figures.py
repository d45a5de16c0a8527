"""Figures of `make models`: what a change of a model's weights costs, and what a scheme left as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from recipes.models.weights import read_tensors
from tasks.jobs.loading.load import load_bf16
from tests.bench.models_page import SEED

TOWERS = ("vision", "visual", "audio", "multi_modal", "projector", "embed_")


@torch.inference_mode()
def cost(dataset: Path, folder: Path, change: Callable[[Tensor], Tensor]) -> float:
    """Mean KL in nats that a change of every matrix of the decoder layers (experts too, no routers) costs a model."""
    rows = pq.read_table(dataset / "rows.parquet", columns=["input_ids"])["input_ids"].to_pylist()[:12]
    model = load_bf16(folder, device="cpu")
    torch.manual_seed(SEED)
    before = [_log_probabilities(model, row) for row in rows]
    changed = 0
    for name, parameter in model.named_parameters():
        if _is_linear(name, tuple(parameter.shape)) and parameter.shape[-1] % 32 == 0:
            parameter.copy_(change(parameter))
            changed += 1
    if not changed:
        raise ValueError("no weight of a decoder layer was found")
    after = [_log_probabilities(model, row) for row in rows]
    kl = [(p.exp() * (p - q)).sum(-1).mean().item() for p, q in zip(before, after, strict=True)]
    return sum(kl) / len(kl)


def _log_probabilities(model: nn.Module, row: list[int]) -> Tensor:
    """[tokens, vocabulary] in fp64."""
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double().log_softmax(-1)


def jittered(weight: Tensor) -> Tensor:
    """Each weight moved by up to half a step of bf16 (8 bits), and rounded to it again."""
    return (weight.float() * (1 + (torch.rand(weight.shape) - 0.5) / 128)).to(weight.dtype)


def rounded(weight: Tensor) -> Tensor:
    """[..., inputs], each 32 inputs on -7 .. 7 times their largest / 7: the plainest thing that a scheme can do."""
    groups = weight.float().unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7
    return ((groups / scale).round() * scale).flatten(-2).to(weight.dtype)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """A weight of a decoder layer that a matrix product takes: no norm, router, convolution, tower."""
    parts = name.split(".")
    inside = any(part.isdigit() for part in parts) and not any(word in name for word in TOWERS)
    plain = len(shape) == 2 or (len(shape) == 3 and min(shape[1:]) > 8)
    return inside and plain and not any(part in ("gate", "router", "shared_expert_gate", "conv1d") for part in parts)


def bf16_share(before: Path, after: Path) -> float:
    """Share of the decoder's linear weights that stand in what a scheme wrote as they stood in its model."""
    written = read_tensors(after)
    sizes: Mapping[str, int] = {
        name: tensor.numel for name, tensor in read_tensors(before).items() if _is_linear(name, tensor.shape)
    }
    left = sum(
        size for name, size in sizes.items() if name in written and written[name].dtype in ("BF16", "F16", "F32")
    )
    return left / max(1, sum(sizes.values()))
