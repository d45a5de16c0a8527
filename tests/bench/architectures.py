"""Tiny random bases of today's architectures: what `make models` puts through every step.

Each has 2 to 4 decoder layers, so that every kind of layer of its type is there (full and windowed attention, linear
attention, state space, dense and mixture), 128 features, and the tokenizer of tests/tiny.py. A whole vision-language
base has its towers and its processor's files, too. All are written by transformers' own save_pretrained, in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from tests.bench.models_page import SEED
from tests.tiny import MARKED, SIZES, _tokenizer, draw_biases

IMAGE = ("<|image|>", "<|image_start|>", "<|image_end|>")  # ids 4, 5, 6 of a whole base
SHAPE: dict[str, Any] = {
    **SIZES,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 3,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,  # outputs of in_proj_a and in_proj_b; real ones have 16 to 64
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
TOWER = {
    "hidden_size": 96,
    "intermediate_size": 144,  # no group of 32 divides it, as SigLIP's 4304
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the page.

    Attributes:
        title: As people call it.
        config: transformers' configuration class.
        values: What differs from SHAPE; None removes a key that the class does not have.
        tower: The vision_config of a whole base; its text_config is then made of SHAPE and `values`.
        outer: More of a whole base's own configuration.
        processor: preprocessor_config.json of a whole base.
    """

    title: str
    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    tower: Mapping[str, Any] | None = None
    outer: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] | None = None

    @property
    def whole(self) -> bool:
        """It has towers beside its text decoder."""
        return self.tower is not None


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(title="Llama", config="LlamaConfig"),
    "llama4": Architecture(
        title="Llama 4 (whole)",
        config="Llama4Config",
        values={
            **{
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size": 128,
                "intermediate_size_mlp": 256,
            },
            **{"interleave_moe_layer_step": 2, "num_hidden_layers": 4, "attention_chunk_size": 32},
        },
        tower={
            **{"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 56, "patch_size": 14, "vision_output_dim": 128},
            **{"projector_input_dim": 96, "projector_output_dim": 96},
        },
        outer={"image_token_index": 4, "boi_token_index": 5, "eoi_token_index": 6},
        processor={"image_processor_type": "Llama4ImageProcessor", "size": {"height": 56, "width": 56}},
    ),
    "qwen2": Architecture(title="Qwen2", config="Qwen2Config", values={"head_dim": None}),
    "qwen3": Architecture(title="Qwen3", config="Qwen3Config", values={"tie_word_embeddings": True}),
    "qwen3.5": Architecture(title="Qwen3.5 (text)", config="Qwen3_5TextConfig", values=LINEAR_ATTENTION),
    "qwen3.5-whole": Architecture(
        title="Qwen3.5 (whole)",
        config="Qwen3_5Config",
        values=LINEAR_ATTENTION,
        tower={
            **{"depth": 2, "hidden_size": 96, "intermediate_size": 144, "num_heads": 4, "patch_size": 14},
            **{"out_hidden_size": 128, "num_position_embeddings": 16},
        },
        outer={"image_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6, "video_token_id": 4},
        processor={"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2},
    ),
    "qwen3-moe": Architecture(title="Qwen3-MoE", config="Qwen3MoeConfig", values=EXPERTS),
    "qwen3-next": Architecture(
        title="Qwen3-Next",
        config="Qwen3NextConfig",
        values={**LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 128},
    ),
    "qwen3.5-moe": Architecture(
        title="Qwen3.5-MoE (text)",
        config="Qwen3_5MoeTextConfig",
        values={**LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 128},
    ),
    "qwen3-vl": Architecture(
        title="Qwen3-VL (whole)",
        config="Qwen3VLConfig",
        tower={
            **{"depth": 2, "hidden_size": 96, "intermediate_size": 144, "num_heads": 4, "patch_size": 14},
            **{"out_hidden_size": 128, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        },
        outer={"image_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6, "video_token_id": 4},
        processor={"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2},
    ),
    "gemma2": Architecture(
        title="Gemma 2",
        config="Gemma2Config",
        values={**WINDOWED, "query_pre_attn_scalar": 32},
    ),
    "gemma3": Architecture(
        title="Gemma 3 (text)", config="Gemma3TextConfig", values={**WINDOWED, "query_pre_attn_scalar": 32}
    ),
    "gemma3-whole": Architecture(
        title="Gemma 3 (whole)",
        config="Gemma3Config",
        values={**WINDOWED, "query_pre_attn_scalar": 32},
        tower=TOWER,
        outer={"image_token_index": 4, "boi_token_index": 5, "eoi_token_index": 6, "mm_tokens_per_image": 4},
        processor={"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}},
    ),
    "gemma4": Architecture(
        title="Gemma 4 (text)",
        config="Gemma4TextConfig",
        values={
            **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 32, "global_head_dim": 64},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **{"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 320, "vocab_size": 320},
        },
    ),
    "gemma4-whole": Architecture(
        title="Gemma 4 (whole)",
        config="Gemma4Config",
        values={
            **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 32, "global_head_dim": 64},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **{"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 320, "vocab_size": 320},
        },
        tower={
            **{"hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 4, "head_dim": 24, "patch_size": 14, "position_embedding_size": 64},
        },
        outer={"image_token_id": 4, "boi_token_id": 5, "eoi_token_id": 6, "audio_config": None},
        processor={"image_processor_type": "Gemma4ImageProcessor", "patch_size": 14},
    ),
    "gemma4-moe": Architecture(
        title="Gemma 4 (mixture, text)",
        config="Gemma4TextConfig",
        values={
            **WINDOWED,
            **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128},
            **{"hidden_size_per_layer_input": 0, "global_head_dim": 64, "attention_k_eq_v": True},
            "num_global_key_value_heads": 1,
        },
    ),
    "mistral": Architecture(title="Mistral", config="MistralConfig", values={"sliding_window": 32}),
    "ministral3": Architecture(title="Ministral 3 (text)", config="Ministral3Config"),
    "mistral3-whole": Architecture(
        title="Mistral 3 (whole)",
        config="Mistral3Config",
        values={"model_type": "ministral3"},
        tower={**TOWER, "model_type": "pixtral", "head_dim": 24},
        outer={"image_token_index": 4, "tie_word_embeddings": False},
        processor={"image_processor_type": "PixtralImageProcessor", "patch_size": 14, "size": {"longest_edge": 56}},
    ),
    "phi3": Architecture(title="Phi-3", config="Phi3Config", values={"head_dim": None}),
    "smollm3": Architecture(
        title="SmolLM3",
        config="SmolLM3Config",
        values={"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "head_dim": None},
    ),
    "smolvlm": Architecture(
        title="SmolVLM (whole)",
        config="SmolVLMConfig",
        values={"model_type": "llama"},
        tower={**TOWER, "image_size": 56},
        outer={"image_token_id": 4},
        processor={"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 56}},
    ),
    "olmo3": Architecture(title="OLMo 3", config="Olmo3Config", values={**WINDOWED, "head_dim": None}),
    "granite": Architecture(title="Granite", config="GraniteConfig", values={"head_dim": None}),
    "granitemoe": Architecture(
        title="GraniteMoE",
        config="GraniteMoeConfig",
        values={"head_dim": None, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    ),
    "glm4": Architecture(title="GLM-4", config="Glm4Config", values={"attention_bias": True}),
    "lfm2": Architecture(
        title="LFM2",
        config="Lfm2Config",
        values={
            **{"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "head_dim": None},
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "gpt-oss": Architecture(
        title="gpt-oss (bf16)",
        config="GptOssConfig",
        values={**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    ),
    "deepseek-v3": Architecture(
        title="DeepSeek-V3",
        config="DeepseekV3Config",
        values={
            **{"head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64},
            **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
            **{"moe_intermediate_size": 128, "num_hidden_layers": 3, "num_mtp_layers": 0},
        },
    ),
    "gpt2": Architecture(
        title="GPT-2",
        config="GPT2Config",
        values={
            **{"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
            **dict.fromkeys(
                (
                    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
                )
            ),
        },
    ),
    "starcoder2": Architecture(
        title="StarCoder2",
        config="Starcoder2Config",
        values={"head_dim": None, "sliding_window": 32, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "nemotron-h": Architecture(
        title="Nemotron-H",
        config="NemotronHConfig",
        values={
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            **{"num_hidden_layers": None, "mamba_num_heads": 64, "mamba_head_dim": 4, "n_groups": 2},
            **{"ssm_state_size": 32, "chunk_size": 32, "use_mamba_kernels": False},
        },
    ),
    "falcon-h1": Architecture(
        title="Falcon-H1",
        config="FalconH1Config",
        values={
            **{"head_dim": None, "mamba_d_ssm": 128, "mamba_n_heads": 16, "mamba_d_head": 8},
            **{"mamba_d_state": 32, "mamba_chunk_size": 32},
        },
    ),
}


def configuration(architecture: Architecture, vocabulary: int) -> transformers.PreTrainedConfig:
    """The configuration of a tiny model; `vocabulary` is that of its tokenizer."""
    values = {"vocab_size": vocabulary, **SHAPE, **architecture.values}
    given = {name: value for name, value in values.items() if value is not None or name == "bos_token_id"}
    of_class = getattr(transformers, architecture.config)
    if not architecture.whole:
        return of_class(**given)
    return of_class(text_config=given, vision_config=dict(architecture.tower or {}), **architecture.outer)


def write_architecture(folder: Path, name: str) -> Path:
    """A base as its own save_pretrained writes it: config, bf16 safetensors, tokenizer, chat template, processor."""
    architecture = ARCHITECTURES[name]
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(bos=False, special=IMAGE if architecture.whole else ())
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(folder)
    config = configuration(architecture, len(tokenizer))
    torch.manual_seed(SEED)
    auto = transformers.AutoModelForImageTextToText if architecture.whole else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    draw_biases(model)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(folder)
    if architecture.processor is not None:
        _write_processor(folder, architecture.processor)
    return folder


def _write_processor(folder: Path, values: Mapping[str, Any]) -> None:
    """What a whole base brings for its images; the bytes have to travel, nothing here reads them."""
    name = str(values["image_processor_type"]).replace("ImageProcessor", "Processor")
    files = {
        "preprocessor_config.json": {**values, "processor_class": name},
        "processor_config.json": {"processor_class": name, "image_seq_length": 4},
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
