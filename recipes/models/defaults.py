"""The text part of config.json with transformers' own defaults where it leaves something out.

Gemma 3's text_config on the hub has four keys: its heads, its vocabulary and its windows are defaults of a Python
class. A child process asks AutoConfig for them (no torch, no network, no code of the model's), only where a number is
missing that the class knows, and the answer is kept under the digest of config.json and transformers' version.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.models.installed import configuration
from recipes.plain import is_mapping, json_object
from recipes.problem import Problem

SECONDS = 120  # for the child; 2 to 3 s on a busy core, more on a network disk

# Without these nothing can be counted. Other spellings, as classes of transformers have them:
SPELLINGS = {
    "vocab_size": (),
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
}
# These are asked for where the class of this model type knows them and config.json does not say them.
OPTIONAL = {
    "num_key_value_heads": ("num_kv_heads",),
    "head_dim": (),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("n_positions", "n_ctx", "model_max_length"),
    "layer_types": ("layers_block_type",),
    "sliding_window": ("attention_window_size",),
    "num_kv_shared_layers": (),
    "per_layer_config": (),
    "multi_query": (),
    "is_encoder_decoder": (),
}
# These come with an answer, and are no reason to ask.
BESIDE = (
    *("tie_word_embeddings", "use_sliding_window", "attention_chunk_size", "new_decoder_architecture"),
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"),
    *("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "conv_L_cache", "mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"),
    *("mamba_d_state", "ssm_state_size", "mamba_d_conv", "mamba_expand"),
)
PER_LAYER = ("head_dim", "num_key_value_heads", "sliding_window")

CHILD = """
import json, sys
sys.modules["torch"] = None  # a config needs none: 2 s in place of 5
from transformers import AutoConfig
whole = AutoConfig.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=False)
text = whole.get_text_config(decoder=True)
names, each = json.loads(sys.argv[2])
text.allow_global_per_layer_attribute_access = True
said = {name: getattr(text, name, None) for name in names}
if getattr(text, "is_heterogeneous", False):
    text.allow_global_per_layer_attribute_access = False
    layers = {str(n): {k: getattr(one, k, None) for k in each} for n, one in enumerate(text.per_layer_config)}
    said["per_layer_config"] = layers
else:
    said["per_layer_config"] = {}
said["is_encoder_decoder"] = bool(whole.is_encoder_decoder)
said["tie_word_embeddings"] = getattr(whole, "tie_word_embeddings", said.get("tie_word_embeddings"))
plain = {name: value for name, value in said.items() if isinstance(value, (bool, int, list, dict))}
print("\\n" + json.dumps(plain))
"""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model; all of it where there is no other part."""
    text_config = config.get("text_config")
    return text_config if is_mapping(text_config) else config


def complete(
    folder: Path, config: Mapping[str, Any], *, key_features: int | None = None
) -> Mapping[str, Any] | Problem:
    """The text part of config.json, completed; a problem where a number stays unknown.

    Args:
        folder: Of the model.
        config: Its config.json.
        key_features: Outputs of its k_proj layers, where all of them have as many: then head_dim need not be asked for.
    """
    text = text_part(config)
    missing = missing_keys(config, key_features=key_features)
    if not missing:
        return text
    answer = _remembered(folder)
    if isinstance(answer, str):
        return _unknown(folder, missing, f"transformers was asked for its defaults and gave none: {answer}")
    completed = {**text, **answer}
    unknown = [name for name, others in SPELLINGS.items() if not any(completed.get(key) for key in (name, *others))]
    return _unknown(folder, unknown, "transformers has no default for it.") if unknown else completed


def missing_keys(config: Mapping[str, Any], *, key_features: int | None = None) -> list[str]:
    """What has to be asked for: config.json does not say it, and the class of this model type knows it."""
    text = text_part(config)
    missing = [name for name, others in SPELLINGS.items() if not _has(text, name, *others)]
    known = known_keys(str(config.get("model_type")), str(text.get("model_type")))
    unsaid = [name for name, others in OPTIONAL.items() if name in known and not _says(text, config, name, *others)]
    if text.get("use_sliding_window") is False:  # Qwen2, Qwen3: every layer is a full one
        unsaid = [name for name in unsaid if name not in ("layer_types", "sliding_window")]
    if key_features is not None and key_features == _plain_heads(text):
        unsaid = [name for name in unsaid if name != "head_dim"]
    return [*missing, *unsaid]


@lru_cache(maxsize=64)
def known_keys(*model_types: str) -> frozenset[str]:
    """Which of the optional keys the configuration classes of these types mention."""
    text = "\n".join(map(configuration, model_types))
    return frozenset(name for name in OPTIONAL if re.search(rf"\b{name}\b", text))


def _has(config: Mapping[str, Any], *names: str) -> bool:
    return any(isinstance(config.get(name), int) and config[name] > 0 for name in names)


def _says(text: Mapping[str, Any], config: Mapping[str, Any], name: str, *others: str) -> bool:
    """The key is there; `null` says something for what may be switched off, nothing for a size."""
    if name == "is_encoder_decoder":
        return name in config
    values = [text[key] for key in (name, *others) if key in text]
    return any(value is not None for value in values) or (bool(values) and name == "sliding_window")


def _plain_heads(text: Mapping[str, Any]) -> int | None:
    """Features of the keys if a head has its share of the width."""
    heads = next((text[key] for key in ("num_attention_heads", "n_head", "n_heads") if _has(text, key)), None)
    hidden = next((text[key] for key in ("hidden_size", "n_embd", "d_model") if _has(text, key)), None)
    if heads is None or hidden is None:
        return None
    return hidden // heads * (text["num_key_value_heads"] if _has(text, "num_key_value_heads") else heads)


# ---- asking, and remembering


def _remembered(folder: Path) -> dict[str, Any] | str:
    """Transformers' answer, from this process, from the cache, or from a child; in words, why there is none."""
    raw = (folder / "config.json").read_bytes()
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    names = sorted({*SPELLINGS, *OPTIONAL, *BESIDE})
    digest = hashlib.sha256(b"\0".join([raw, version.encode(), CHILD.encode(), "".join(names).encode()])).hexdigest()
    if digest not in _ANSWERS:
        answer = json_object(_cache() / f"{digest}.json")
        if answer is None:
            answer = _ask(folder, names)
            if isinstance(answer, str):
                return answer
            _write(_cache() / f"{digest}.json", answer)
        _ANSWERS[digest] = answer
    return _ANSWERS[digest]


_ANSWERS: dict[str, dict[str, Any]] = {}  # by digest, for the life of the process


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "quench" / "configs"


def _write(path: Path, answer: Mapping[str, Any]) -> None:
    """Whole or not at all, beside others that write the same; a disk that takes nothing only costs the time again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(answer, file)
        Path(file.name).replace(path)


def _ask(folder: Path, names: list[str]) -> dict[str, Any] | str:
    """What AutoConfig makes of the folder's config.json; in words, why it makes nothing of it."""
    command = [sys.executable, "-P", "-c", CHILD, str(folder), json.dumps([names, PER_LAYER])]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        child = subprocess.run(
            command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {SECONDS} s."
    try:
        answer: object = json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else None
    except (IndexError, json.JSONDecodeError):
        answer = None
    if is_mapping(answer):
        return answer
    lines = [line for line in child.stderr.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)] or lines
    return raised[-1][:300] if raised else f"it ended with code {child.returncode}."


def _unknown(folder: Path, names: list[str], why: str) -> Problem:
    return Problem(
        what=f"config.json does not say {', '.join(names)}.",
        where=str(folder / "config.json"),
        why=f"{why} Layers, memory and sizes cannot be counted without.",
        next="Write it into config.json (text_config of a model with several parts) as the release's card says, or "
        "name a base of a model type that transformers has.",
    )
