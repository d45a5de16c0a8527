"""How an artifact is served: serve.json, and serve.md for readers. Commands are run in the artifact's folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.headers import Headers
from recipes.schemes import Scheme, listed
from recipes.serving import NAMES, READS, cautions, loaders, parallel_sizes, refusals, rows_of

SCHEMA = 1
DTYPE = "bfloat16"  # what models are trained, merged and evaluated in
WHY_DTYPE = (
    "the model was trained and evaluated in bf16. fp16 ends at 65,504; activations of a model that was trained in bf16 "
    "can be larger, and fp16 kernels overflow then (vllm#1941, #16579). Take --dtype float16 only on GPUs without bf16 "
    "(before compute capability 8.0), and try your own prompts first."
)


def describe(
    headers: Headers,
    *,
    name: str,
    scheme: Scheme | None,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
) -> dict[str, Any]:
    """What serve.json holds.

    Args:
        headers: Of the model in bf16: shapes, longest context, chat template.
        name: Of the artifact; the name under which it is served.
        scheme: How it is quantized; None where it is not.
        tensor_parallel: GPUs that each layer is split over.
        max_model_len: Tokens of prompt and answer; default: the longest context.
    """
    length = max_model_len or headers.max_positions
    return {
        "schema": SCHEMA,
        "name": name,
        "scheme": scheme.slug if scheme else None,
        "form": scheme.form if scheme else "bf16",
        "dtype": DTYPE,
        "max_model_len": length,
        "chat_template": headers.has_chat_template,
        "kv_scales": bool(scheme and scheme.kv_scales),
        "loaders": {one: _needs(scheme, one) for one in loaders(scheme)}
        if scheme
        else {"transformers": "", "vllm": ""},
        "vllm": _vllm(headers, name, scheme, ranks=tensor_parallel, length=length),
    }


def _needs(scheme: Scheme, engine: str) -> str:
    return ", ".join(row.needs for row in READS if row.engine == engine and row in rows_of(scheme, row.engine))


def _vllm(headers: Headers, name: str, scheme: Scheme | None, *, ranks: int, length: int | None) -> dict[str, Any]:
    """The command, or why there is none."""
    sizes = parallel_sizes(scheme, headers.linears, "vllm")
    refused = refusals(scheme, headers.linears, "vllm", ranks) if scheme else []
    careful = cautions(scheme, headers.linears, "vllm", ranks) if scheme else []
    command = ["vllm", "serve", "$PWD", "--served-model-name", name, "--dtype", DTYPE]
    command += ["--max-model-len", str(length)] if length else []
    command += ["--tensor-parallel-size", str(ranks)]
    return {
        "command": None if refused else command,
        "refused": [one.as_dict() for one in refused],
        "cautions": [one.as_dict() for one in careful],
        "tensor_parallel_sizes": list(sizes),
    }


def readable(served: Mapping[str, Any]) -> str:
    """serve.md."""
    lines = [f"# Serving {served['name']}", "", "Commands are run in this folder.", "", "## vLLM", ""]
    lines += _vllm_lines(served) if served["vllm"]["command"] else _refused_lines(served)
    lines += ["", "## transformers", "", *_transformers_lines(served)]
    others = [f"{NAMES[one]}{f' (with {needs})' if needs else ''}" for one, needs in _others(served)]
    if others:
        lines += ["", f"These read it, too: {', '.join(others)}."]
    return "\n".join(lines) + "\n"


def _others(served: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    yield from ((one, needs) for one, needs in served["loaders"].items() if one not in ("transformers", "vllm"))


def shell(command: list[str]) -> str:
    """The command as it is typed; $PWD is left to the shell."""
    return " ".join('"$PWD"' if word == "$PWD" else shlex.quote(word) for word in command)


def _vllm_lines(served: Mapping[str, Any]) -> Iterator[str]:
    vllm = served["vllm"]
    yield from ["```", shell(vllm["command"]), "```", ""]
    if needs := served["loaders"].get("vllm"):
        yield f"* It needs {needs}."
    if served["scheme"]:
        yield "* No --quantization: vLLM reads the method from config.json and picks the fastest kernel for it."
    yield f"* --dtype {served['dtype']}: {WHY_DTYPE}"
    if served["max_model_len"]:
        yield f"* --max-model-len {served['max_model_len']}: prompt and answer; less leaves memory for more requests."
    sizes = listed(vllm["tensor_parallel_sizes"])
    yield f"* --tensor-parallel-size: of 1, 2, 4 and 8 GPUs {sizes} can share it, by shapes and groups."
    if served["chat_template"]:
        yield "* No --chat-template: the template stands beside the tokenizer, and vLLM reads it there."
    else:
        yield "* The folder has no chat template: name one by --chat-template."
    yield _kv_line(served["kv_scales"])
    for one in vllm["cautions"]:
        yield f"* {one['what']} {one['why']}"


def _kv_line(calibrated: bool) -> str:
    if calibrated:
        return (
            "* FP8 scales of the KV cache were calibrated and stand in the files: --kv-cache-dtype fp8 uses them. What "
            "that costs is not measured here; without the flag the cache stays in bf16."
        )
    return "* No --kv-cache-dtype: no scales were calibrated, so an FP8 cache would take 1.0 for all of them."


def _refused_lines(served: Mapping[str, Any]) -> Iterator[str]:
    for one in served["vllm"]["refused"]:
        yield f"{one['what']} {one['why']} {one['next']}"


def _transformers_lines(served: Mapping[str, Any]) -> Iterator[str]:
    if needs := served["loaders"].get("transformers"):
        yield f"It needs {needs}."
        yield ""
    yield from [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained(".", dtype="{served["dtype"]}", device_map="auto")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]


def write(folder: Path, served: Mapping[str, Any]) -> None:
    """serve.json and serve.md. The same model and scheme give the same bytes."""
    (folder / "serve.json").write_text(json.dumps(served, indent=2) + "\n", encoding="utf-8")
    (folder / "serve.md").write_text(readable(served), encoding="utf-8")
