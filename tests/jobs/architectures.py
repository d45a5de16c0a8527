"""Tiny bases of the architectures that are merged, and adapters that are really trained on them for a few steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tasks.jobs.loading.load import load_bf16, load_nf4
from tasks.jobs.merging.nf4 import write_record
from tests.jobs.whole_models import WHOLE, write_whole
from tests.tiny import SIZES, TEMPLATES, _tokenizer, draw_biases

SHAPE: dict[str, Any] = SIZES | {"intermediate_size": 192, "max_position_embeddings": 128}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,  # biases of q, k, v
    "qwen3": Qwen3Config,  # norms of q and k
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,  # qkv and gate_up fused
    "gpt2": GPT2Config,  # Conv1D
    "qwen3-moe": Qwen3MoeConfig,  # experts are no linear layers: attention is trained
    "gpt-oss": GptOssConfig,  # experts are one tensor in the file, too
}
EXTRA: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.04},
    "qwen3-moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt-oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
}
MOE_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def write_architecture(folder: Path, name: str, *, shard: str = "5GB", tied: bool | None = None) -> Path:
    """A base of one architecture as its own save_pretrained writes it, with a tokenizer.

    Those of `tests.jobs.whole_models.WHOLE` have towers.
    """
    if name in WHOLE:
        return write_whole(folder, name)
    tokenizer = _tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATES["plain"]
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3}
    shape = {} if name == "gpt2" else SHAPE
    ties = {} if tied is None else {"tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**shape, **EXTRA.get(name, {}), **ids, **ties))
    draw_biases(model)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return folder


def tokens(rows: int = 4, *, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, 48]."""
    return torch.randint(4, 300, (rows, 48), generator=torch.Generator().manual_seed(seed))


def train_adapter(
    base: Path, folder: Path, *, on: str = "nf4", steps: int = 3, record: bool = True, prepare: Any = None, **lora: Any
) -> Path:
    """Train a LoRA for a few steps at a high rate and save it as PEFT does, with a record of the NF4 base."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    model = (load_nf4 if on == "nf4" else load_bf16)(base, device="cpu")
    if prepare is not None:
        prepare(model)
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(**settings)).train()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch = tokens(seed=2)
    for _ in range(steps):
        loss = peft(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    save(peft, folder, base)
    if record:
        write_record(peft, folder)
    return folder


def save(peft: PeftModel, folder: Path, base: Path) -> None:
    """As training leaves it: tokenizer files in tokenizer/, the base named by no path."""
    peft.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(base / name, folder / "tokenizer" / name)
