"""Checkpoints of any size with random weights and an adapter for them, written as a stream."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from recipes.models.adapters import PREFIX
from tasks.jobs.merging.streams import PlannedTensor, Writer
from tests.tiny import _tokenizer

PART = 1 << 24


def write_synthetic(folder: Path, *, hidden: int, intermediate: int, layers: int, vocabulary: int) -> Path:
    """A Llama of these sizes in bf16. Its weights repeat every 16 M, so that making them costs little."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    _tokenizer(bos=False).save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in AutoModelForCausalLM.from_config(config).state_dict().items()}
    noise = (0.02 * torch.randn(PART, generator=torch.Generator().manual_seed(0))).bfloat16()
    with Writer(folder, [PlannedTensor(name, torch.bfloat16, shape) for name, shape in shapes.items()]) as writer:
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            for first in range(0, size, PART):
                writer.write(name, noise[: min(PART, size - first)], first)
    return folder


def write_synthetic_adapter(folder: Path, base: Path, *, rank: int = 16) -> Path:
    """A LoRA on every linear layer of the decoder, in fp32 as training writes it."""
    folder.mkdir(parents=True)
    config = LlamaConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    torch.manual_seed(1)
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            tensors[f"{PREFIX}model.{name}.lora_A.weight"] = 0.02 * torch.randn(rank, module.in_features)
            tensors[f"{PREFIX}model.{name}.lora_B.weight"] = 0.02 * torch.randn(module.out_features, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
