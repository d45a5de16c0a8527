"""Model folders and data files for tests of the recipe side: real formats, zeros as weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def llama_shapes(*, hidden: int, intermediate: int, kv: int, layers: int, vocabulary: int) -> dict[str, list[int]]:
    """Tensor names and shapes [out, in] of a tied Llama."""
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes[f"{layer}.input_layernorm.weight"] = [hidden]
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": [hidden, hidden] for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": [kv, hidden] for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": [intermediate, hidden] for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = [hidden, intermediate]
    return shapes


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of bf16 zeros, byte by byte as the format says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(file.tell() + end)  # sparse


def write_base(
    folder: Path,
    *,
    hidden: int = 128,
    intermediate: int = 256,
    kv: int = 64,
    layers: int = 2,
    vocabulary: int = 300,
    template: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """A Llama's folder: config.json, model.safetensors, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = llama_shapes(hidden=hidden, intermediate=intermediate, kv=kv, layers=layers, vocabulary=vocabulary)
    write_safetensors(folder / "model.safetensors", shapes)
    written = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 * kv // hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE} if template else {}))
    return folder


def chat(number: int, **columns: Any) -> dict[str, Any]:
    """A good row, unlike any other."""
    turns = [
        {"role": "user", "content": f"What comes after {number}, in words that are long enough to fill a row?"},
        {"role": "assistant", "content": f"After {number} comes {number + 1}."},
    ]
    return {"messages": turns, **columns}


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL; a string stands as it is, for malformed lines."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_project(folder: Path, *, rows: int = 260, extra: str = "", **base: Any) -> Path:
    """A folder with base/, rows.jsonl and a recipe.yaml that passes; `extra` is added to the recipe."""
    write_base(folder / "base", **base)
    write_rows(folder / "rows.jsonl", (chat(number) for number in range(rows)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "name: test\nmodel:\n  base: base\ndata:\n  path: rows.jsonl\n  max_length: 128\ncalibrate:\n  rows: 128\n"
        + extra
    )
    return recipe


def write_like_quickstart(folder: Path, recipe: str) -> Path:
    """A project on a base of the quickstart's shape, on which memory was measured; returns the recipe's file."""
    write_base(folder / "base", hidden=256, intermediate=768, kv=128, layers=6, vocabulary=4096)
    write_rows(folder / "rows.jsonl", map(chat, range(300)))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"
