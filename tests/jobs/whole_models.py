"""Tiny random models with towers, as their own save_pretrained writes them: vision-language and audio bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    Gemma3Processor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.tiny import SIZES, TEMPLATES, _tokenizer, draw_biases

TEXT: dict[str, Any] = {
    **SIZES,
    "vocab_size": 300,
    "intermediate_size": 192,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 3,
}
# 88: no multiple of 32 or 64, as towers have it (4,304 in SigLIP): no scheme may be refused for their sizes.
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
FULL_AND_LINEAR = ["linear_attention", "full_attention"]


class Whole:
    """How a tiny model with towers is made.

    Attributes:
        architecture: Its class, as config.json names it.
        config: Arguments of its configuration's class.
    """

    def __init__(self, architecture: str, config_class: str, **config: Any) -> None:
        self.architecture = architecture
        self._config_class = config_class
        self._config = config

    def config(self) -> PreTrainedConfig:
        """Its configuration."""
        return getattr(transformers, self._config_class)(**self._config)


def _of(name: str, **config: Any) -> Whole:
    return Whole(f"{name}ForConditionalGeneration", f"{name}Config", **config)


WHOLE = {
    "gemma3-whole": _of(
        "Gemma3",
        text_config=TEXT | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=299,
        boi_token_index=297,
        eoi_token_index=298,
    ),
    "gemma4-whole": _of(
        "Gemma4",
        text_config=TEXT
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "vocab_size_per_layer_input": 300,
            "hidden_size_per_layer_input": 16,
        },
        vision_config={key: value for key, value in VISION.items() if key != "image_size"}
        | {"num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 64},
        audio_config=None,
        image_token_id=299,
        video_token_id=298,
        audio_token_id=297,
        boi_token_id=296,
        eoi_token_id=295,
    ),
    "qwen3.5-whole": _of(
        "Qwen3_5",
        text_config=TEXT
        | {
            "layer_types": FULL_AND_LINEAR,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
        },
        vision_config=QWEN_VISION,
        image_token_id=299,
        video_token_id=298,
        vision_start_token_id=297,
        vision_end_token_id=296,
    ),
    "qwen3-vl": _of(
        "Qwen3VL",
        text_config=TEXT | {"rope_parameters": MROPE},
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]},
        image_token_id=299,
        video_token_id=298,
        vision_start_token_id=297,
        vision_end_token_id=296,
    ),
    "mistral3": _of(
        "Mistral3",
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 16},
        image_token_index=4,
        tie_word_embeddings=False,
    ),
    "smolvlm": _of(
        "SmolVLM",
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION,
        image_token_id=299,
        scale_factor=2,
    ),
    "llama4-whole": _of(
        "Llama4",
        text_config=TEXT
        | {"intermediate_size_mlp": 192, "num_local_experts": 4, "moe_layers": [1], "attention_chunk_size": 256},
        vision_config=VISION
        | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "intermediate_size": 256},
        image_token_index=299,
        boi_token_index=298,
        eoi_token_index=297,
    ),
    "voxtral": _of(
        "Voxtral",
        text_config=TEXT | {"model_type": "llama"},
        audio_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_mel_bins": 8,
            "max_source_positions": 32,
        },
        audio_token_id=24,
    ),
}
IMAGE_TOKENS = {"boi_token": "<|im_start|>", "eoi_token": "<|im_end|>", "image_token": "<|begin|>"}


def write_whole(folder: Path, name: str, *, template: str = "plain") -> Path:
    """A base with towers, its tokenizer, and the files of its processor.

    Those of Gemma 3 load by AutoProcessor; the others stand for files whose loading takes torchvision.
    """
    whole = WHOLE[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATES[template]
    _write_processor(folder, name, tokenizer)
    torch.manual_seed(0)
    model = getattr(transformers, whole.architecture)(whole.config())
    draw_biases(model)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _write_processor(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    size = {"height": 32, "width": 32}
    if name == "gemma3-whole":
        named = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            extra_special_tokens=IMAGE_TOKENS,
        )
        named.chat_template = tokenizer.chat_template
        Gemma3Processor(Gemma3ImageProcessorPil(size=size), named, image_seq_length=4).save_pretrained(folder)
        return
    tokenizer.save_pretrained(folder)
    for file in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / file).write_text(json.dumps({"size": size, "file": file}), encoding="utf-8")
