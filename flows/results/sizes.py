"""size_bytes: what a server must fetch before it can answer. Weights, config and tokenizer; none of our records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from flows.results.read import Run, RunArm
from recipes.models.headers import Headers, read_headers
from recipes.problem import RecipeError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
BESIDE = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tokenizer.model",
    "chat_template.*",
    "chat_template_args.json",
    "chat_templates/*",
    "additional_chat_templates/*",
)
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
NF4_BLOCK = 64  # weights that share an absmax
NF4_NESTED = 256  # absmax values that share a second, fp32 one


def nf4_weight_bytes(headers: Headers) -> int:
    """Bytes of the base as NF4 with double quantization, from shapes alone (arXiv:2305.14314, section 3).

    A linear layer inside the decoder: 4 bits a weight, 1 byte a block of 64, 4 bytes for 256 blocks. The rest, experts
    of a mixture among it: bf16.
    """
    quantized = 0
    for layer in headers.dense_linears:
        blocks = math.ceil(layer.weights / NF4_BLOCK)
        quantized += math.ceil(layer.weights / 2) + blocks + 4 * math.ceil(blocks / NF4_NESTED)
    return quantized + 2 * (headers.parameters - headers.dense_linear_parameters)


def size_bytes(arm: RunArm, run: Run) -> tuple[int | None, str | None]:
    """(bytes, None), or (None, why not)."""
    try:
        model = _model_files(arm, run)
    except (FileNotFoundError, RecipeError) as error:
        return None, str(error).splitlines()[0]
    if arm.adapter is None:
        return sum(model.values()), None
    adapter = run.step(arm.adapter)
    if adapter is None or adapter.manifest is None:
        return None, f"{arm.adapter} is not in the store"
    files = {name: one["size"] for name, one in adapter.manifest["files"].items()}
    # The adapter brings the tokenizer it was trained with: it stands in for the model's, it is not fetched twice.
    own = {name.removeprefix("tokenizer/"): size for name, size in files.items() if name.startswith("tokenizer/")}
    on_top = {name: files[name] for name in ADAPTER if name in files}
    return sum({**model, **_wanted(own, BESIDE), **on_top}.values()), None


def _model_files(arm: RunArm, run: Run) -> dict[str, int]:
    """Name -> bytes of the model that is loaded.

    Raises:
        FileNotFoundError: It is not there any more.
        RecipeError: The base folder cannot be read.
    """
    if arm.model is not None:
        step = run.step(arm.model)
        if step is None or step.manifest is None:
            raise FileNotFoundError(f"{arm.model} is not in the store")
        return _wanted({name: one["size"] for name, one in step.manifest["files"].items()}, (*WEIGHTS, *BESIDE))
    folder = run.external(arm.slug) if arm.external else run.base
    if folder is None:
        raise FileNotFoundError(f"the folder of {arm.slug if arm.external else 'the base model'} has gone")
    if arm.kind == "nf4":
        return {**_folder(folder, BESIDE), "weights in NF4": nf4_weight_bytes(read_headers(folder))}
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _folder(folder, (*WEIGHTS, *BESIDE))
    shards = tuple(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return _folder(folder, (*shards, index.name, *BESIDE))


def _folder(folder: Path, patterns: tuple[str, ...]) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return _wanted({path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, patterns)


def _wanted(files: Mapping[str, int], patterns: tuple[str, ...]) -> dict[str, int]:
    return {
        name: size
        for name, size in files.items()
        if any(fnmatch(name, pattern) for pattern in patterns)
        and ("/" not in name or name.startswith(("chat_templates/", "additional_chat_templates/")))
    }
