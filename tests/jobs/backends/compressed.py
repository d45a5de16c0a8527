"""Reads and writes the compressed-tensors format by its definition, without the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.models.headers import read_headers
from recipes.schemes.scheme import Grid, Scheme
from tasks.jobs.backends.llm_compressor import targets
from tasks.jobs.backends.quench_rtn import pack
from tests.jobs.quantized import codes


def unpacked(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """[out, in] bf16 of a layer: (code - zero) * scale, rounded once.

    Codes are packed along the inputs, zero points along the outputs; a file without zero points means 2^(bits - 1).
    """
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    weight = codes(packed, bits)[:, :columns].float().view(rows, scale.shape[1], -1)
    zero = torch.full(scale.shape, 2.0 ** (bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zero = codes(tensors[f"{name}.weight_zero_point"].t().contiguous(), bits).t()[:rows].float()
    return ((weight - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(rows, columns).bfloat16()


def layers(folder: Path, scheme: Scheme) -> dict[str, Tensor]:
    """Every quantized layer of a folder as `unpacked` reads it, on the grid that the scheme gives it."""
    tensors = load_file(folder / "model.safetensors")
    names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    return {name: unpacked(tensors, name, grid.bits) for name in names if (grid := scheme.grid_of(name))}


def write(base: Path, out: Path, scheme: Scheme, *, kv_scale: float | None = None) -> None:
    """`base` rounded to nearest on the scheme's grids."""
    out.mkdir()
    tensors = load_file(base / "model.safetensors")
    names = [layer.name for layer in read_headers(base).linears]
    for name in names:
        if grid := scheme.grid_of(name):
            tensors |= {f"{name}.{part}": one for part, one in _rounded(tensors.pop(f"{name}.weight"), grid).items()}
    if kv_scale is not None:
        for attention in {name.rpartition(".")[0] for name in names if name.endswith("k_proj")}:
            tensors |= {f"{attention}.{part}_scale": torch.tensor([kv_scale]).bfloat16() for part in "kv"}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    groups = {f"group_{i}": _group(grid, found) for i, (grid, found) in enumerate(targets(scheme, names).items())}
    kept = [name for name in names if scheme.grid_of(name) is None]
    stored: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *kept],
        "config_groups": groups,
    }
    if kv_scale is not None:
        stored["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": stored}
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(base / name, out / name)


def _rounded(weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    groups, top = weight.float().view(len(weight), -1, size), 2**grid.bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if grid.symmetric:
        scale, zero = (2 * groups.abs().amax(-1) / top).bfloat16(), torch.full(low.shape, 2.0 ** (grid.bits - 1))
    else:
        scale = ((high - low) / top).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, top)
    codes = (groups / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
    parts = {
        "weight_packed": pack(codes.clamp(0, top).to(torch.uint8).view(weight.shape), bits=grid.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not grid.symmetric:
        parts["weight_zero_point"] = pack(zero.to(torch.uint8).t().contiguous(), bits=grid.bits).t().contiguous()
    return parts


def _group(grid: Grid, found: list[str]) -> dict[str, Any]:
    per_channel = grid.group_size == -1
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else grid.group_size,
    }
    return {"targets": found, "weights": weights}
