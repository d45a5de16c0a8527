"""Names of layers in a checkpoint and in the model that transformers makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from tasks.jobs.backends.names import linear_modules
from tasks.jobs.loading.names import modules_of, stored_parameters
from tasks.runtime.process.errors import StageError
from tests.jobs.architectures import SHAPE

SMALL = SHAPE | {"vocab_size": 300}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}


def on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_vision_language_model_has_other_names_than_its_file() -> None:
    vision = SiglipVisionConfig(**VISION, image_size=56, patch_size=14)
    model = on_meta(Gemma3Config(text_config=Gemma3TextConfig(**SMALL).to_dict(), vision_config=vision.to_dict()))
    layer = "layers.1.self_attn.q_proj"
    names = [f"language_model.model.{layer}", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"]
    modules = modules_of(model, names)
    assert modules[names[0]] == f"model.language_model.{layer}"
    assert all(isinstance(model.get_submodule(module), torch.nn.Linear) for module in modules.values())
    assert linear_modules(model, names[:1], backend="GPTQModel") == {names[0]: f"model.language_model.{layer}"}


def test_names_of_a_language_model_are_those_of_its_file() -> None:
    model = on_meta(LlamaConfig(**SMALL))
    names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith("proj.weight")]
    assert len(names) == 14 and modules_of(model, names) == {name: name for name in names}


def test_experts_that_transformers_joins_are_no_linear_layers_there() -> None:
    model = on_meta(Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64))
    expert, attention = "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.self_attn.q_proj"
    stored = stored_parameters(model, [f"{name}.weight" for name in (expert, attention)])
    assert stored.parts and stored.tensors == {f"{attention}.weight": f"{attention}.weight"}
    with pytest.raises(StageError, match="fused"):
        linear_modules(model, [attention, expert], backend="GPTQModel")
