"""The tensors of a checkpoint, by its safetensors headers: nothing else of the weights is read.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, JSON that names every
tensor with dtype, shape and byte range. Standard library only, so that a 70B base is checked in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.plain import is_mapping, json_object
from recipes.problem import Problem, RecipeError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


class Tensor(NamedTuple):
    """One tensor of a checkpoint, by its header: `n_bytes` bytes of `file` from byte `start` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    file: Path
    start: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, in the order of its files.

    Raises:
        RecipeError: With every problem of its index and headers.
    """
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    if index.exists():
        return _indexed(index, files)
    if not files:
        raise _no_safetensors(folder).error()
    return _read_files(files, problems=[])


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, by name.

    Raises:
        RecipeError: The file is truncated or broken.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise _broken(path, "It is a Git LFS pointer, not the file.", remedy="Run `git lfs pull`.").error()
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _broken(path, f"Its header would end behind its {size} bytes.").error()
        raw = file.read(length)
    try:
        header: object = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise _broken(path, "Its header is not JSON.").error() from None
    if not is_mapping(header):
        raise _broken(path, "Its header is not a JSON object.").error()
    try:
        tensors = _tensors(path, header, data_start=8 + length)
        end = max((tensor.start + tensor.n_bytes for tensor in tensors.values()), default=8 + length)
    except (KeyError, TypeError, ValueError):
        raise _broken(path, "Its header lacks a dtype, a shape or a byte range.").error() from None
    if end > size:
        raise _broken(path, f"Its tensors end at byte {end}, the file at {size}.").error()
    return tensors


def _tensors(path: Path, header: Mapping[str, Any], *, data_start: int) -> dict[str, Tensor]:
    return {
        name: Tensor(name, entry["dtype"], tuple(entry["shape"]), end - begin, path, data_start + begin)
        for name, entry in header.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    }


def _read_files(files: Sequence[Path], *, problems: Sequence[Problem]) -> dict[str, Tensor]:
    """Every tensor of these files by name; raises with these problems and with every broken file."""
    tensors: dict[str, Tensor] = {}
    problems = list(problems)
    for file in files:
        try:
            tensors |= read_file(file)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return tensors


def _indexed(index: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """Every tensor of the files that the index names."""
    weight_map = _weight_map(index)
    named = set(weight_map.values())
    problems: list[Problem] = []
    if missing := sorted(named - {file.name for file in files}):
        problems.append(
            Problem(
                what=f"{len(missing)} of the {len(named)} weight files are missing: {', '.join(missing)}.",
                where=str(index),
                why="The index names them; their tensors are nowhere else.",
                next="Finish the download of the base, then check again.",
            )
        )
    tensors = _read_files([file for file in files if file.name in named], problems=problems)
    where = {name: tensor.file.name for name, tensor in tensors.items()}
    if absent := [name for name, file in weight_map.items() if where.get(name) != file]:
        raise Problem(
            what=f"The index names {len(absent)} tensor(s) that are not in its files: {', '.join(absent)}.",
            where=str(index),
            why="Index and files belong to different checkpoints, so some weights would be missing.",
            next="Download the index and the weight files of one revision again.",
        ).error()
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor."""
    weight_map = (json_object(index) or {}).get("weight_map")
    if not is_mapping(weight_map):
        raise Problem(
            what="The index of the weights is broken.",
            where=str(index),
            why="It holds no JSON object `weight_map`.",
            next="Download the base again.",
        ).error()
    return {name: str(file) for name, file in weight_map.items()}


def _no_safetensors(folder: Path) -> Problem:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return Problem(
            what="The base has no safetensors file.",
            where=str(folder),
            why="Weights are read from *.safetensors only.",
            next="Finish the download, or check the path of model.base.",
        )
    return Problem(
        what=f"The base has its weights as pickles only: {', '.join(pickles)}.",
        where=str(folder),
        why="A pickle can run code when it is opened, so none is ever opened here.",
        next='If you trust where it comes from, convert it once: python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='bfloat16').save_pretrained('{folder}-st')\" "
        f"and copy the tokenizer files to {folder}-st.",
    )


def _broken(path: Path, why: str, *, remedy: str = "Download or write this file again.") -> Problem:
    return Problem(what="A weight file is truncated or broken.", where=str(path), why=why, next=remedy)
