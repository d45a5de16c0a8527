"""Safetensors headers of strangers: what is refused here, and that it is what the format's own library refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from recipes.models.weights import BITS, read_file
from recipes.problem import RecipeError


def entry(begin: Any = 0, end: Any = 8, *, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def write(path: Path, header: Any, *, data: int = 8, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + b"\0" * data)
    return path


def refusal(path: Path) -> str:
    """Why our reader refuses a file; nothing where it does not."""
    try:
        read_file(path)
    except RecipeError as error:
        (problem,) = error.problems
        assert all(problem.as_dict().values()) and str(path) in problem.where
        return f"{problem.what} {problem.why}"
    return ""


TWICE = b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)
BROKEN = {
    "overlap": ({"a": entry(), "b": entry(4, 12)}, 12, "overlaps the tensor before it"),
    "the same bytes": ({"a": entry(), "b": entry()}, 8, "overlaps"),
    "hole": ({"a": entry(4, 12)}, 12, "leaves a hole"),
    "tail": ({"a": entry()}, 12, "tensors end at byte"),
    "cut": ({"a": entry()}, 4, "tensors end at byte"),
    "other shape": ({"a": entry(shape=(3,))}, 8, "'a' has 8 bytes there, which are not those of F32 [3]"),
    "huge shape": ({"a": entry(shape=(2**40, 2**40))}, 8, "not those of F32"),
    "unknown type": ({"a": entry(dtype="F7")}, 8, "does not read: F7"),
    "no type": ({"a": entry(dtype=None)}, 8, "lacks a dtype"),
    "negative": ({"a": entry(-8, 0)}, 8, "lacks a dtype, a shape or a byte range of 'a'"),
    "a float": ({"a": entry(shape=(2.0,))}, 8, "lacks"),
    "true": ({"a": entry(True, 9)}, 9, "lacks"),
    "text": ({"a": entry(shape="ab")}, 8, "lacks"),
    "no entry": ({"a": [1, 2]}, 8, "lacks"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, 8, "lacks"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, 8, "is not text by name"),
    "list": ([], 0, "not a JSON object"),
    "not JSON": (b"{", 0, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not JSON"),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16"), 8, "not JSON"),
    "half a pair": ({"\ud800": entry()}, 8, "not JSON"),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": NaN}}', 8, "not JSON"),
    "deep": (b"[" * 100_000, 0, "not JSON"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", 0, "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_says_what_is_wrong_and_the_library_refuses_it_too(tmp_path: Path, name: str) -> None:
    header, data, why = BROKEN[name]
    path = write(tmp_path / "model.safetensors", header, data=data)
    assert why in refusal(path)
    with pytest.raises(SafetensorError), safe_open(path, "np"):
        pass


def test_a_key_that_is_there_twice_is_refused_though_the_library_takes_the_last(tmp_path: Path) -> None:
    assert "has the key 'a' twice" in refusal(write(tmp_path / "model.safetensors", TWICE))


@pytest.mark.parametrize("length", [0, 10**8, 2**63, 2**64 - 1])
def test_a_length_that_lies(tmp_path: Path, length: int) -> None:
    assert refusal(write(tmp_path / "model.safetensors", {"a": entry()}, length=length))


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_that_is_known_here_is_known_to_the_library(tmp_path: Path, dtype: str) -> None:
    path = write(
        tmp_path / "model.safetensors", {"a": entry(0, BITS[dtype], dtype=dtype, shape=(8,))}, data=BITS[dtype]
    )
    assert refusal(path) == ""
    with safe_open(path, "np") as file:
        assert [*file.keys()] == ["a"]


def test_what_cannot_be_opened_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    assert "No such file" in refusal(tmp_path / "gone.safetensors")
    assert "Is a directory" in refusal(tmp_path / "folder.safetensors")


def test_empty_tensors_and_scalars_are_none_of_these(tmp_path: Path) -> None:
    header = {"b": entry(0, 4, shape=()), "a": entry(0, 0, shape=(0, 5)), "c": entry(4, 4, shape=(0,))}
    assert refusal(write(tmp_path / "model.safetensors", header, data=4)) == ""
