"""What a model folder says before any weight is read: config.json, safetensors headers, tokenizer files.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, JSON that names every
tensor with dtype, shape and byte range. Standard library only, so that a 70B base is checked in milliseconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes.models.linear import Linear
from recipes.plain import is_mapping, json_object
from recipes.problem import Problem, RecipeError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
TRANSPOSED = ("gpt2", "openai-gpt")  # Conv1D: weights are [in, out]
_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?)(?P<number>\d+)\.(?P<rest>.+)\.weight$")
_ROUTER = re.compile(r"(^|\.)(gate|router)$")  # routers of mixtures of experts stay unquantized

_EXPERT = re.compile(r"\.experts\.")


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


@dataclass(frozen=True, kw_only=True)
class Headers:
    """A causal language model as its folder describes it.

    Attributes:
        folder: The model folder.
        config: config.json.
        text_config: Its text part, for a model with several.
        tensors: Every tensor, by name.
        linears: What a scheme quantizes: 2-D weights inside the repeated layers, but for routers.
        has_chat_template: The base brings a chat template.
    """

    folder: Path
    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    linears: tuple[Linear, ...]
    has_chat_template: bool

    @property
    def parameters(self) -> int:
        """Stored parameters; tied ones count once."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def linear_parameters(self) -> int:
        """Parameters that a scheme quantizes."""
        return sum(layer.in_features * layer.out_features for layer in self.linears)

    @property
    def expert_parameters(self) -> int:
        """Parameters of the experts of a mixture, stored one by one or as 3-D tensors: training leaves them bf16."""
        return sum(tensor.numel for name, tensor in self.tensors.items() if _EXPERT.search(name))

    @property
    def dense_linears(self) -> tuple[Linear, ...]:
        """The linear layers that are no experts: what training quantizes and adapts."""
        return tuple(layer for layer in self.linears if not _EXPERT.search(layer.name))

    @property
    def dense_linear_parameters(self) -> int:
        """Parameters of the linear layers that are no experts."""
        return _parameters(list(self.dense_linears))

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embeddings and, where it is untied, the output layer."""
        return sum(
            tensor.numel
            for name, tensor in self.tensors.items()
            if len(tensor.shape) == 2 and self.vocabulary in tensor.shape and not _LAYER.match(name)
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def tied(self) -> bool:
        """No output layer is stored: the input embeddings serve as it."""
        return not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in self.tensors)

    @property
    def vocabulary(self) -> int:
        """Entries of the vocabulary."""
        return self._number("vocab_size") or 0

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self._number("hidden_size", "n_embd", "d_model") or 0

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self._number("num_hidden_layers", "n_layer", "num_layers") or 0

    @property
    def max_positions(self) -> int | None:
        """Longest context the base was made for, in tokens; None where config.json names none."""
        return self._number("max_position_embeddings", "n_positions", "n_ctx")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self._number("num_attention_heads", "n_head") or 1

    @property
    def kv_features(self) -> int:
        """Features of keys (or values) a token and layer: heads x head size."""
        size = self._number("head_dim") or self.hidden // self.heads
        return size * (self._number("num_key_value_heads") or self.heads)

    @property
    def decoder_layer(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer, the one with most."""
        found: dict[str, list[Linear]] = {}
        for layer in self.linears:
            found.setdefault(_first_number(layer.name), []).append(layer)
        return tuple(max(found.values(), key=_parameters))

    @property
    def largest_in_features(self) -> int:
        """Inputs of the widest layer that a scheme quantizes: the size of the largest Hessian."""
        return max(layer.in_features for layer in self.linears)

    def _number(self, *names: str) -> int | None:
        for name in names:
            value = self.text_config.get(name)
            if isinstance(value, int):
                return value
        return None


def is_expert(name: str) -> bool:
    """The layer of this name is an expert of a mixture."""
    return _EXPERT.search(name) is not None


def _first_number(name: str) -> str:
    return next(part for part in name.split(".") if part.isdigit())


def _parameters(layers: list[Linear]) -> int:
    return sum(layer.in_features * layer.out_features for layer in layers)


def read_headers(folder: Path) -> Headers:
    """Read a base model's folder.

    Raises:
        RecipeError: With every problem: no config.json, no safetensors or broken ones, no tokenizer, an adapter or an
            already quantized model instead of a base.
    """
    problems: list[Problem] = []
    config = _config(folder, problems)
    tensors = _tensors(folder, problems)
    _check_tokenizer(folder, problems)
    text_config = config.get("text_config", config)
    text_config = text_config if is_mapping(text_config) else config
    transposed = text_config.get("model_type") in TRANSPOSED
    linears = tuple(_linears(tensors, transposed=transposed))
    if tensors and config and not linears:
        problems.append(_no_layers(folder))
    if problems:
        raise RecipeError(problems)
    return Headers(
        folder=folder,
        config=config,
        text_config=text_config,
        tensors=tensors,
        linears=linears,
        has_chat_template=_has_chat_template(folder),
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, in the order of its files.

    Raises:
        RecipeError: With every problem of its index and headers.
    """
    problems: list[Problem] = []
    tensors = _tensors(folder, problems)
    if problems:
        raise RecipeError(problems)
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, by name.

    Raises:
        RecipeError: The file is truncated or broken.
    """
    problems: list[Problem] = []
    tensors = _header(path, problems)
    if problems:
        raise RecipeError(problems)
    return {tensor.name: tensor for tensor in tensors}


def _config(folder: Path, problems: list[Problem]) -> dict[str, Any]:
    path = folder / "config.json"
    config = json_object(path)
    if config is not None:
        if "quantization_config" in config:
            problems.append(
                Problem(
                    what="The base is quantized already.",
                    where=f"{path} quantization_config",
                    why="Training quantizes the original weights to NF4, and merging needs them too.",
                    next="Name the original bf16, fp16 or fp32 model.",
                )
            )
        return config
    adapter = (folder / "adapter_config.json").exists()
    problems.append(
        Problem(
            what="config.json is not readable JSON." if path.exists() else "The base has no config.json.",
            where=str(path if path.exists() else folder),
            why="It is an adapter, not a base model." if adapter else "It names the architecture and its sizes.",
            next="Name the base that the adapter was trained on."
            if adapter
            else "Name a model folder as transformers' save_pretrained writes it.",
        )
    )
    return {}


# ---- weights


def _tensors(folder: Path, problems: list[Problem]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint; empty, with a problem, where it cannot be read."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    placed: dict[str, str] = {}
    if index.exists():
        placed = _weight_map(index, problems)
        wanted = set(placed.values())
        missing = sorted(wanted - {file.name for file in files})
        if missing:
            problems.append(
                Problem(
                    what=f"{len(missing)} of the {len(wanted)} weight files are missing: {', '.join(missing)}.",
                    where=str(index),
                    why="The index names them; their tensors are nowhere else.",
                    next="Finish the download of the base, then check again.",
                )
            )
        files = [file for file in files if file.name in wanted]
    elif not files:
        problems.append(_no_safetensors(folder))
    found = {tensor.name: tensor for file in files for tensor in _header(file, problems)}
    if not problems and (absent := [name for name, file in placed.items() if not _is_in(found.get(name), file)]):
        problems.append(
            Problem(
                what=f"The index names {len(absent)} tensor(s) that are not in its files: {', '.join(absent)}.",
                where=str(index),
                why="Index and files belong to different checkpoints, so some weights would be missing.",
                next="Download the index and the weight files of one revision again.",
            )
        )
    return found


def _is_in(tensor: Tensor | None, file: str) -> bool:
    return tensor is not None and tensor.file.name == file


def _weight_map(index: Path, problems: list[Problem]) -> dict[str, str]:
    weight_map = (json_object(index) or {}).get("weight_map")
    if is_mapping(weight_map):
        return {name: str(file) for name, file in weight_map.items()}
    problems.append(
        Problem(
            what="The index of the weights is broken.",
            where=str(index),
            why="It holds no JSON object `weight_map`.",
            next="Download the base again.",
        )
    )
    return {}


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


def _header(path: Path, problems: list[Problem]) -> list[Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            return _broken(path, "It is a Git LFS pointer, not the file.", problems, remedy="Run `git lfs pull`.")
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            return _broken(path, f"Its header would end behind its {size} bytes.", problems)
        raw = file.read(length)
    try:
        header: object = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return _broken(path, "Its header is not JSON.", problems)
    if not is_mapping(header):
        return _broken(path, "Its header is not a JSON object.", problems)
    try:
        tensors = [
            Tensor(name, entry["dtype"], tuple(entry["shape"]), end - begin, path, 8 + length + begin)
            for name, entry in header.items()
            if name != "__metadata__"
            for begin, end in [entry["data_offsets"]]
        ]
        end = max((tensor.start + tensor.n_bytes for tensor in tensors), default=8 + length)
    except (KeyError, TypeError, ValueError):
        return _broken(path, "Its header lacks a dtype, a shape or a byte range.", problems)
    if end > size:
        return _broken(path, f"Its tensors end at byte {end}, the file at {size}.", problems)
    return tensors


def _broken(path: Path, why: str, problems: list[Problem], *, remedy: str = "") -> list[Tensor]:
    problems.append(
        Problem(
            what="A weight file is truncated or broken.",
            where=str(path),
            why=why,
            next=remedy or "Download or write this file again.",
        )
    )
    return []


def _linears(tensors: Mapping[str, Tensor], *, transposed: bool) -> Iterator[Linear]:
    """2-D weights inside numbered layers, in the order of the checkpoint."""
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        if match is None or len(tensor.shape) != 2 or _ROUTER.search(match["rest"]):
            continue
        rows, columns = tensor.shape
        yield Linear(name.removesuffix(".weight"), *((rows, columns) if transposed else (columns, rows)))


def _no_layers(folder: Path) -> Problem:
    return Problem(
        what="The base has no linear layers inside repeated decoder layers.",
        where=str(folder),
        why="Those are what an adapter trains and a scheme quantizes.",
        next="Name a causal language model of a Llama-like, Qwen, Mistral, Gemma, Phi or GPT-2 architecture.",
    )


# ---- tokenizer


def _check_tokenizer(folder: Path, problems: list[Problem]) -> None:
    if any((folder / name).exists() for name in TOKENIZERS):
        return
    problems.append(
        Problem(
            what="The base has no tokenizer.",
            where=str(folder),
            why=f"None of {', '.join(TOKENIZERS)} is there, so no row can become tokens.",
            next="Copy the tokenizer files of the base into its folder.",
        )
    )


def _has_chat_template(folder: Path) -> bool:
    files = ("chat_template.jinja", "chat_template.json", "chat_templates")
    in_config = (json_object(folder / "tokenizer_config.json") or {}).get("chat_template")
    return bool(in_config) or any((folder / name).exists() for name in files)
