"""A tiny random base model in a folder, for tests: real tokenizer, real safetensors, written in under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, START, END, BOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"  # ids 0, 1, 2, 3
TEXT = "what colour is the sky ? SELECT name FROM books WHERE year > 1990 system user assistant the answer is blue"

MARKED = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
PLAIN = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.04,
}
TEMPLATES: dict[str, str | None] = {"marked": MARKED, "plain": PLAIN, "none": None}


def draw_biases(model: PreTrainedModel) -> None:
    """They start as zeros, and a lost one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)


def write_base(
    folder: Path,
    *,
    architecture: Literal["llama", "qwen3"] = "llama",
    chat_template: bool | Literal["marked", "plain", "none"] | str = True,
    tied: bool = True,
    bos: bool = False,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write config, bf16 safetensors, tokenizer and generation config of a 0.5 M-parameter model.

    Args:
        folder: Where to; made if it is missing.
        architecture: `llama` or `qwen3` (query and key norms).
        chat_template: True or `marked`: ChatML with generation markers; `plain`: without them; False or `none`: no
            template; any other string is the template itself.
        tied: Output embeddings are the input embeddings.
        bos: The tokenizer puts a beginning-of-text token before plain text.
        seed: Of the weights.
        tokenizer: Another one, see `other_tokenizer`; with its own template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = [2, 0]
    if tokenizer is None:
        tokenizer = _tokenizer(bos=bos)
        named = {True: "marked", False: "none"}.get(chat_template, chat_template)
        tokenizer.chat_template = TEMPLATES.get(named, named)
    else:
        ends = [tokenizer.eos_token_id]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = _model(architecture, len(tokenizer), tied=tied)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[-1])
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_tokenizer(
    folder: Path,
    template: str,
    *,
    special: tuple[str, ...] = (),
    bos: str | None = None,
    end: str = END,
    pad: str = PAD,
) -> Path:
    """Write a tokenizer alone, for tests of chat templates.

    Args:
        folder: Where to; made if it is missing.
        template: The chat template.
        special: More special tokens, behind the four that every tiny tokenizer has.
        bos: Beginning-of-text token; must be special.
        end: End-of-text token; must be special.
        pad: Padding token; must be special.
    """
    tokenizer = _tokenizer(bos=False, special=special)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, end, pad
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


OTHER = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] + '<|stop|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def other_tokenizer(*, chat_template: str | None = OTHER, vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE with other merges, special tokens and template; `<|stop|>` (id 0) ends a turn and a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["the answer is green or red , an answer of many colours ; INSERT INTO shelves VALUES ( 7 )"],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|stop|>", "<|system|>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|stop|>", pad_token="<|stop|>")
    made.chat_template = chat_template
    return made


def _tokenizer(*, bos: bool, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[PAD, START, END, BOS, *special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    extra = {"bos_token": BOS, "add_bos_token": True} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, **extra)


def _model(architecture: str, vocab_size: int, *, tied: bool) -> PreTrainedModel:
    shape = {
        "vocab_size": vocab_size,
        **SIZES,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape))
    return LlamaForCausalLM(LlamaConfig(**shape))
