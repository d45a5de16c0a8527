"""Rewrites a checkpoint with some of its tensors replaced, one shard at a time, under the input's file names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipes.models.weights import read_tensors


def rewrite(model: Path, out: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> dict[str, str]:
    """Write every tensor as `change` gives it.

    Args:
        model: Folder with *.safetensors.
        out: Gets as many files, and their index where there are several.
        change: Name and tensor -> the tensors to write in its place, by name.

    Returns:
        File by name of what was written.
    """
    files: dict[str, str] = {}
    total = 0
    for shard in sorted({tensor.file for tensor in read_tensors(model).values()}):
        tensors: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                tensors |= change(name, file.get_tensor(name))
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, shard.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        _write_json(out / "model.safetensors.index.json", index)
    return files


def write_configs(model: Path, out: Path, *, quantization: dict[str, Any]) -> None:
    """config.json of the model with this quantization_config, and quantize_config.json, which AutoGPTQ reads."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    _write_json(out / "config.json", config | {"quantization_config": quantization})
    _write_json(out / "quantize_config.json", quantization)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
