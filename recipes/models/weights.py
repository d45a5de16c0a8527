"""The tensors of a checkpoint, by its safetensors headers: nothing else of the weights is read.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, JSON that names every
tensor with dtype, shape and byte range. Standard library only, so that a 70B base is checked in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.plain import NOT_JSON, is_mapping, json_object
from recipes.problem import Problem, RecipeError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
NAME, SIDES, SHOWN = 80, 8, 20  # characters of a name, sides of a shape, names of a list that an error shows
BITS = {  # of one number, by the types that safetensors 0.8 reads
    "BOOL": 8,
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8},
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


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

    What passes here opens in the format's own library, which every later step reads with.

    Raises:
        RecipeError: The file is truncated or broken.
    """
    try:
        raw, size = _header(path)
    except OSError as error:  # a link into a cache that was emptied; a folder of this name
        raise _broken(path, f"It cannot be read: {error.strerror}.").error() from None
    try:
        header: object = json.loads(raw.decode(), object_pairs_hook=_without_repeats, parse_constant=_no_number)
        if b"\\u" in raw:
            json.dumps(header, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except _Twice as error:
        raise _broken(path, f"Its header has the key {error} twice.").error() from None
    except NOT_JSON:
        raise _broken(path, "Its header is not JSON.").error() from None
    if not is_mapping(header):
        raise _broken(path, "Its header is not a JSON object.").error()
    tensors = _tensors(path, header, data_start=8 + len(raw))
    _check_places(path, tensors.values(), data_start=8 + len(raw), size=size)
    return tensors


class _Twice(ValueError):
    """A key that one object of a header has twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(f"{name[:NAME]!a}" for name in names if names.count(name) > 1))
    return value


def _no_number(name: str) -> float:
    raise ValueError(name)  # NaN, Infinity: Python's, not JSON's


def _header(path: Path) -> tuple[bytes, int]:
    """The header as it is written, and the bytes of the whole file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise _broken(path, "It is a Git LFS pointer, not the file.", remedy="Run `git lfs pull`.").error()
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _broken(path, f"Its header would end behind its {size} bytes.").error()
        return file.read(length), size


def _tensors(path: Path, header: Mapping[str, Any], *, data_start: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            _check_metadata(path, entry)
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if _are_sizes(
                [*shape, begin, end]
            ):
                pass
            case _:
                raise _broken(path, f"Its header lacks a dtype, a shape or a byte range of {name[:NAME]!a}.").error()
        if dtype not in BITS:
            raise _unknown_type(path, name, dtype).error()
        if BITS[dtype] * math.prod(shape) != 8 * (end - begin):
            why = f"{name[:NAME]!a} has {end - begin} bytes there, which are not those of {dtype} {shown_shape(shape)}."
            raise _broken(path, f"Its header contradicts itself: {why}").error()
        tensors[name] = Tensor(name, dtype, tuple(shape), end - begin, path, data_start + begin)
    return tensors


def _are_sizes(numbers: Sequence[Any]) -> bool:
    """Whole numbers from 0 on that 64 bits hold; true is none."""
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def shown_shape(shape: Sequence[int]) -> str:
    """`[256, 4096]`; of many sides the first ones."""
    return str(list(shape)) if len(shape) <= SIDES else f"of {len(shape)} dimensions"


def _check_metadata(path: Path, metadata: object) -> None:
    is_text = is_mapping(metadata) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not is_text:
        raise _broken(path, "The `__metadata__` of its header is not text by name.").error()


def _check_places(path: Path, tensors: Iterable[Tensor], *, data_start: int, size: int) -> None:
    """Tensors lie one behind the other, from the end of the header to the end of the file."""
    at = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.n_bytes)):
        if tensor.start != at:
            where = "overlaps the tensor before it" if tensor.start < at else "leaves a hole before it"
            raise _broken(path, f"The byte range of {tensor.name[:NAME]!a} {where}.").error()
        at += tensor.n_bytes
    if at != size:
        raise _broken(path, f"Its tensors end at byte {at}, the file at {size}.").error()


def _unknown_type(path: Path, name: str, dtype: str) -> Problem:
    return Problem(
        what=f"A weight file has numbers of a type that safetensors here does not read: {dtype[:NAME]}.",
        where=f"{path} {name[:NAME]}",
        why=f"Known are {', '.join(BITS)}. The file is newer, or its header is broken.",
        next="Name a release in another type, or take a release of Quench with a newer safetensors.",
    )


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
                what=f"{len(missing)} of the {len(named)} weight files are missing: {_listed(missing)}.",
                where=str(index),
                why="The index names them; their tensors are nowhere else.",
                next="Finish the download of the base, then check again.",
            )
        )
    tensors = _read_files([file for file in files if file.name in named], problems=problems)
    where = {name: tensor.file.name for name, tensor in tensors.items()}
    if absent := [name for name, file in weight_map.items() if where.get(name) != file]:
        raise Problem(
            what=f"The index names {len(absent)} tensor(s) that are not in its files: {_listed(absent)}.",
            where=str(index),
            why="Index and files belong to different checkpoints, so some weights would be missing.",
            next="Download the index and the weight files of one revision again.",
        ).error()
    return tensors


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:NAME] for name in names[:SHOWN]) + more


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
