"""config.json, adapter_config.json and safetensors headers by their number, in folders that are otherwise good."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from recipes.models.defaults import BESIDE, OPTIONAL, SPELLINGS
from tests.fuzz.odd import NUMBERS, TEXTS, as_json, changed, fewer_values, nested, odd
from tests.fuzz.recipes import QUICKSTART

BASE = QUICKSTART / "base"
CONFIG: dict[str, Any] = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
LEGAL_SHARE = 0.3
HIDDEN, LAYERS, WIDE = 256, 6, 768  # of the quickstart's base
DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "I8", "U8", "I32", "I64", "BOOL", "F4", "X", "", None, 16, ["F32"])
RECIPE = "name: fuzz\nmodel: {base: base}\ndata: {path: data/sql.jsonl, domain: family, group: group}\n"
RECIPES = {
    "base": RECIPE,
    "other": f"{RECIPE}evaluate: {{external: {{other: other}}}}\n",
    "adapter": f"{RECIPE}train: {{adapter: adapter}}\n",
}


def place(folder: Path) -> None:
    """A base, another model and an adapter, and a recipe for each."""
    (folder / "data").symlink_to(QUICKSTART / "data")
    for name in ("base", "other"):
        (folder / name).mkdir()
        for file in BASE.iterdir():
            (folder / name / file.name).symlink_to(file)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_bytes(as_json(adapter_tree()))
    _write_weights(folder / "adapter" / "adapter_model.safetensors", packed(adapter_header()))
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def target(number: int, *names: str) -> str:
    """Which of the folders a case is about."""
    return Random(f"target {number}").choice(names)


def put(path: Path, content: bytes) -> None:
    """In place of a link or an earlier case's file."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# ---- config.json


def config_name(number: int) -> str:
    """The folder whose config.json a case writes: of the base, of an external model."""
    return target(number, "base", "base", "other")


def config(number: int) -> bytes:
    """A config.json."""
    draw = Random(f"config {number}")
    tree = draw.choice((CONFIG, _composite(), _windows(), _mixture(), _states(), _gpt2()))
    if draw.random() < LEGAL_SHARE:
        return as_json(tree, indent=draw.choice((None, 2)))
    for _ in range(draw.choice((1, 1, 2, 5))):
        tree = _odd_number(tree, draw) if draw.random() < 0.4 else changed(tree, draw)
    return _spoiled(as_json(tree), draw)


def _composite() -> dict[str, Any]:
    text = {key: value for key, value in CONFIG.items() if key not in ("architectures", "transformers_version")}
    tower = {"model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 2}
    return {"architectures": ["X"], "model_type": "llama", "text_config": text, "vision_config": tower}


def _windows() -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"] * 3
    return CONFIG | {"layer_types": kinds, "sliding_window": 128, "num_kv_shared_layers": 2, "use_sliding_window": True}


def _mixture() -> dict[str, Any]:
    experts = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 64, "n_routed_experts": 0}
    latent = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    return CONFIG | experts | latent | {"per_layer_config": {"0": {"head_dim": 32}}}


def _states() -> dict[str, Any]:
    state = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_conv": 4, "mamba_expand": 2}
    delta = {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return CONFIG | state | delta | {"layer_types": ["linear_attention", "full_attention", "conv"] * 2}


def _gpt2() -> dict[str, Any]:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "vocab_size": 4096, "n_positions": 1024}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes}


def _odd_number(tree: Any, draw: Random) -> Any:
    """One of the keys that are counted with, of a value that nothing counts with."""
    tree = deepcopy(tree)
    inner = tree.get("text_config") if draw.random() < 0.7 else tree
    inner = inner if isinstance(inner, dict) else tree
    names = (*SPELLINGS, *OPTIONAL, *BESIDE, "quantization_config", "auto_map", "model_type", "pad_token_id")
    inner[draw.choice(names)] = draw.choice(NUMBERS) if draw.random() < 0.6 else odd(draw)
    return tree


def _spoiled(content: bytes, draw: Random) -> bytes:
    """Mostly as it is; else no JSON, or JSON that hardly anything reads."""
    if draw.random() < 0.75:
        return content
    deep = json.dumps(nested(draw.choice((100, 900)), mapping=draw.random() < 0.5))
    at = draw.randrange(max(1, len(content)))
    return draw.choice(
        (
            b"",
            content[:at],
            b"\xef\xbb\xbf" + content,
            content.decode().encode("utf-16"),
            content[:at] + b"\xff\xfe\x00" + content[at:],
            content + content,
            b"[" * 100_000,
            b'{"a":' * 100_000,
            f'{{"a": {deep}}}'.encode(),
            b'{"hidden_size": ' + b"9" * 5000 + b"}",
            content.replace(b"256", b"9" * 5000),
            b"null",
            b"[]",
            b'"text"',
            content.replace(b"{", b'{"model_type": "llama", "model_type": "gpt2", ', 1),
        )
    )


# ---- files of the tokenizer

TOKENIZERS = ("tokenizer_config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")
SETTINGS: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}, "4095": {"content": "last"}},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "model_max_length": 1024,
    },
    "tokenizer.json": {
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True}, {"id": 4096, "content": "more"}],
        "model": {"type": "BPE", "vocab": {"a": 3, "b": 4}, "merges": []},
    },
    "generation_config.json": {"pad_token_id": 0, "eos_token_id": [2], "bos_token_id": None},
}


def tokenizer_name(number: int) -> str:
    """The file that a case writes."""
    return target(number, *TOKENIZERS)


def tokenizer(number: int) -> bytes:
    """A file of the tokenizer."""
    draw = Random(f"tokenizer {number}")
    tree = SETTINGS[tokenizer_name(number)]
    if draw.random() < LEGAL_SHARE:
        return as_json(tree)
    for _ in range(draw.choice((1, 1, 2, 4))):
        tree = changed(tree, draw)
    return _spoiled(as_json(tree), draw)


# ---- adapters


def adapter_tree() -> dict[str, Any]:
    """As PEFT writes it, with every key that readers look at."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "init_lora_weights": True,
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": None,
        "modules_to_save": ["norm"],
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 8},
        "trainable_token_indices": {"embed_tokens": [1, 2, 3]},
        "use_rslora": False,
        "use_dora": False,
        "ensure_weight_tying": False,
        "alora_invocation_tokens": None,
        "task_type": "CAUSAL_LM",
    }


def adapter_name(number: int) -> str:
    """The file of the adapter's folder that a case writes."""
    names = ("adapter_config.json",) * 6
    return target(number, *names, "config.json", "nf4.json")


def adapter(number: int) -> bytes:
    """An adapter_config.json, or what lies beside it."""
    draw = Random(f"adapter {number}")
    if (name := adapter_name(number)) == "adapter_config.json":
        tree: Any = adapter_tree()
        for key in draw.sample(sorted(tree), draw.choice((0, 0, 3))):
            if key != "peft_type":
                del tree[key]
        tree |= draw.choice(({}, {"layers_to_transform": [0, 1, 2, 3, 4, 5]}, {"target_modules": r".*\.(q|v)_proj"}))
    else:
        quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization["llm_int8_skip_modules"] = ["lm_head"]
        tree = {"quantization_config": quantization} if name == "config.json" else {"modules": {"a": 1}}
    if draw.random() < LEGAL_SHARE:
        return as_json(tree)
    for _ in range(draw.choice((1, 1, 2, 4))):
        tree = _odd_key(tree, draw) if draw.random() < 0.4 else changed(tree, draw)
    return _spoiled(as_json(tree), draw)


def _odd_key(tree: Any, draw: Random) -> Any:
    tree = deepcopy(tree)
    if isinstance(tree, dict) and tree:
        tree[draw.choice(sorted(map(str, tree)))] = draw.choice(TEXTS) if draw.random() < 0.4 else odd(draw)
    return tree


# ---- safetensors


def header_of(path: Path) -> dict[str, Any]:
    """The header of a file."""
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def laid_out(shapes: dict[str, tuple[int, ...]], *, dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    """A header of tensors one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        count = 1
        for side in shape:
            count *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count * size]}
        at += count * size
    return header


def adapter_header() -> dict[str, Any]:
    """LoRA on q and v of every layer, a norm, three tokens."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", HIDDEN // 2)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes |= {f"{module}.lora_A.weight": (8, HIDDEN), f"{module}.lora_B.weight": (out, 8)}
    shapes["base_model.model.model.norm.weight"] = (HIDDEN,)
    shapes["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = (3, HIDDEN)
    return laid_out(shapes)


def weights_name(number: int) -> str:
    """The folder whose file of weights a case writes."""
    return target(number, "base", "base", "other", "adapter")


def weights(number: int) -> bytes:
    """Length and header of a safetensors file; `write_weights` puts its data behind it."""
    draw = Random(f"weights {number}")
    name = weights_name(number)
    header = adapter_header() if name == "adapter" else header_of(BASE / "model.safetensors")
    if draw.random() < LEGAL_SHARE:
        return packed(header, spaces=draw.choice((0, 7, 1000)))
    for _ in range(draw.choice((1, 1, 1, 2, 6))):
        header = draw.choice(WRONG)(deepcopy(header), draw)
    raw = as_json(header, indent=None)
    raw = raw if draw.random() < 0.8 else draw.choice(RAW)(raw, draw)
    return _length(len(raw), draw) + raw


def write_weights(path: Path, number: int, content: bytes) -> None:
    """The content and as many bytes of data as its tensors need, or fewer, or more; a hole takes no room on disk."""
    draw = Random(f"tail {number}")
    path.unlink(missing_ok=True)
    _write_weights(path, content, factor=1.0 if draw.random() < 0.8 else draw.choice((0.0, 0.5, 0.99, 1.01, 3.0)))


def packed(header: dict[str, Any], *, spaces: int = 0) -> bytes:
    """With its length before it."""
    raw = as_json(header, indent=None) + b" " * spaces
    return len(raw).to_bytes(8, "little") + raw


def fewer_tensors(content: bytes) -> Iterator[bytes]:
    """The same with one thing less in the header."""
    for raw in fewer_values(content[8:]):
        yield len(raw).to_bytes(8, "little") + raw


def _write_weights(path: Path, content: bytes, *, factor: float = 1.0) -> None:
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(content[8:]).items() if name != "__metadata__"]
        size = max((end for end in ends if isinstance(end, int) and 0 <= end < 1 << 27), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        size = 0
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + int(size * factor))


def _length(right: int, draw: Random) -> bytes:
    """Mostly the right one."""
    if draw.random() < 0.85:
        return right.to_bytes(8, "little")
    wrong = draw.choice((0, 1, right - 1, right + 1, right // 2, 10**8, 2**31, 2**63, 2**64 - 1))
    return draw.choice((wrong.to_bytes(8, "little"), b"version ", b"PK\x03\x04\0\0\0\0", b"", b"\x80"))


def _entry(change: Callable[[dict[str, Any], Random], Any]) -> Callable[[dict[str, Any], Random], dict[str, Any]]:
    """Change one tensor's entry in place, or put what the function returns in its place."""

    def wrong(header: dict[str, Any], draw: Random) -> dict[str, Any]:
        names = [name for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
        if names:
            name = draw.choice(names)
            returned = change(header[name], draw)
            header[name] = header[name] if returned is None else returned
        return header

    return wrong


def _renamed(header: dict[str, Any], draw: Random) -> dict[str, Any]:
    name = draw.choice(sorted(map(str, header)) or [""])
    other = draw.choice((*TEXTS, name + "x", name.replace("layers.0", "layers.99999999999999999999"), name.upper()))
    return {other if key == name else key: value for key, value in header.items()}


def _without_layer(header: dict[str, Any], draw: Random) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if f"layers.{draw.choice((0, 5))}." not in name}


SHAPES = (
    *([], [0], [-1, 4], [2**40, 2**40], [10**400], [1.5, 2]),
    *(None, "ab", 4, {}, [None], ["a"], [[1]], [True]),
)
OFFSETS = (
    *([0, 0], [8, 0], [-8, 8], [0, 2**70], [0], [0, 10**400]),
    *(None, 5, "ab", [0, 1, 2], [0.5, 2.5], ["0", "8"], [True, 8]),
)
MANY = range(3000)
WRONG: tuple[Callable[[dict[str, Any], Random], dict[str, Any]], ...] = (
    _entry(lambda entry, draw: entry.update(dtype=draw.choice(DTYPES))),
    _entry(lambda entry, draw: entry.update(shape=draw.choice(SHAPES))),
    _entry(lambda entry, draw: entry.update(shape=draw.choice(SHAPES))),
    _entry(lambda entry, draw: entry.update(shape=[1] * draw.choice((0, 1, 3, 5000)))),
    _entry(lambda entry, draw: entry.update(shape=entry["shape"][::-1] if isinstance(entry.get("shape"), list) else 1)),
    _entry(lambda entry, draw: entry.update(data_offsets=draw.choice(OFFSETS))),
    _entry(lambda entry, draw: entry.update(data_offsets=draw.choice(OFFSETS))),
    _entry(lambda entry, draw: entry.update(data_offsets=[draw.choice(NUMBERS), draw.choice(NUMBERS)])),
    _entry(lambda entry, draw: entry.update({draw.choice(("x", "dtype", "shape")): odd(draw)})),
    _entry(lambda entry, draw: entry.pop(draw.choice(("dtype", "shape", "data_offsets")), None) and None),
    _entry(lambda entry, draw: draw.choice(([], "text", 5, None, {}, [1, 2]))),
    _renamed,
    _renamed,
    _without_layer,
    lambda header, draw: changed(header, draw) if isinstance(header, dict) and header else header,
    lambda header, draw: header | {"__metadata__": odd(draw)},
    lambda header, draw: header | {draw.choice(TEXTS): odd(draw)},
    lambda header, draw: header | {f"extra.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in MANY},
    lambda header, draw: {},
)
RAW: tuple[Callable[[bytes, Random], bytes], ...] = (
    lambda raw, draw: raw[: draw.randrange(len(raw) + 1)],
    lambda raw, draw: raw.replace(b"{", b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 1,', 1),
    lambda raw, draw: raw[:20] + b"\xff\xfe" + raw[20:],
    lambda raw, draw: raw.decode().encode("utf-16"),
    lambda raw, draw: b"[" * 200_000,
    lambda raw, draw: b'{"a":' * 100_000,
    lambda raw, draw: raw + raw,
    lambda raw, draw: b"[]",
    lambda raw, draw: b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    lambda raw, draw: raw.replace(b'"shape": [', b'"shape": [NaN, ', 1),
    lambda raw, draw: draw.randbytes(200),
)
