"""Checkpoints tensor by tensor: elements are read from and written to their place in a safetensors file.

Nothing is mapped into memory (pages of a mapped file count as this process's memory), and no shard is held: a file's
header is written first, since names, types and shapes are known, then every tensor at its own offset, in any order.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from recipes.models import headers
from tasks.runtime.process.errors import StageError

SHARD = "5GB"  # what transformers wrote for years; hubs and loaders are used to it
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, shared with it where it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


class Reader(ExitStack):
    """Reads parts of stored tensors; safe to share between threads."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, int] = {}

    def open(self, tensors: Iterable[headers.Tensor]) -> None:
        """Open the files of these tensors. To be called before threads read."""
        for path in {tensor.file for tensor in tensors} - self._open.keys():
            self._open[path] = os.open(path, os.O_RDONLY)
            self.callback(os.close, self._open[path])

    def read(self, tensor: headers.Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Elements first to last (exclusive, in row-major order) of a stored tensor: 1-D, on the CPU, as stored."""
        dtype = DTYPES[tensor.dtype]
        last = tensor.numel if last is None else last
        raw = torch.empty((last - first) * dtype.itemsize, dtype=torch.uint8)
        view, done, begin = raw_bytes(raw), 0, tensor.start + first * dtype.itemsize
        while done < len(view):
            count = os.preadv(self._open[tensor.file], [view[done:]], begin + done)
            if not count:
                raise StageError.of(
                    what="a weight file ended while it was read",
                    where=str(tensor.file),
                    why="it is shorter than its header says",
                    next="download or write this file again",
                )
            done += count
        return raw.view(dtype)

    def whole(self, tensor: headers.Tensor) -> Tensor:
        """A stored tensor in its shape."""
        return self.read(tensor).view(tensor.shape)


class PlannedTensor(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Place(NamedTuple):
    descriptor: int
    start: int


class Writer(ExitStack):
    """Writes the tensors of a plan into one model.safetensors, or 5 GB shards and their index.

    Raises:
        StageError: The disk is full.
    """

    def __init__(self, folder: Path, plan: Iterable[PlannedTensor]) -> None:
        super().__init__()
        self._places: dict[str, _Place] = {}
        planned = {tensor.name: tensor for tensor in plan}
        meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in planned.items()}
        split = split_torch_state_dict_into_shards(meta, max_shard_size=SHARD)
        for file, names in split.filename_to_tensors.items():
            self._begin(folder / file, [planned[name] for name in names])
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def write(self, name: str, values: Tensor, first: int = 0) -> None:
        """Write values of a planned tensor, in its type, from element `first` on; safe to call from several threads."""
        place = self._places[name]
        _write(place.descriptor, raw_bytes(values), place.start + first * values.dtype.itemsize)

    def _begin(self, path: Path, tensors: list[PlannedTensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        # Wide types first, as the format's own writer does: every tensor starts at a multiple of its element size.
        for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
            size = tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
            header[tensor.name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + size],
            }
            offsets[tensor] = end
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.callback(os.close, descriptor)
        _write(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        for tensor, offset in offsets.items():
            self._places[tensor.name] = _Place(descriptor, 8 + len(text) + offset)


def _write(descriptor: int, raw: memoryview, offset: int) -> None:
    done = 0
    while done < len(raw):
        try:
            done += os.pwrite(descriptor, raw[done:], offset + done)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StageError.of(
                what=f"the disk is full: {error.strerror}",
                where=str(Path(f"/proc/self/fd/{descriptor}").readlink()),
                why="the merged model does not fit; what was written of it is thrown away",
                next="free space there (the model needs about 2 bytes per parameter), then run the same again",
            ) from error
