"""What is wrong with a base model's folder, and what to type next."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.plain import LARGEST, is_list, is_mapping
from recipes.problem import Problem

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
DEQUANTIZERS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}  # of transformers 5.23; they run on a CPU
SIZES = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers"),
    *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
)
_HEAD = re.compile(r"For([A-Z]\w*)$")
TEXT_HEADS = ("CausalLM", "ConditionalGeneration")  # of LlamaForCausalLM, Gemma3ForConditionalGeneration


def has_tokenizer(folder: Path) -> bool:
    """True where the folder holds a tokenizer's file."""
    return any((folder / name).exists() for name in TOKENIZERS)


def config_problems(folder: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Values that nothing can be counted with, already quantized, or no model of text."""
    yield from type_problems(folder, config)
    if "quantization_config" in config:
        yield _quantized_already(folder, config)
    head = _HEAD.search(architecture(config) or "")
    if head and head[1] not in TEXT_HEADS:
        yield Problem(
            what=f"The base makes no text: it is a {architecture(config)}.",
            where=f"{folder / 'config.json'} architectures",
            why="Its last layer gives classes or scores in place of the next token, so rows of chat cannot train it.",
            next="Name the causal language model that it was made from.",
        )
    if config.get("is_encoder_decoder"):
        yield encoder_decoder(folder)


def type_problems(folder: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Sizes and names of another kind than transformers writes: a number in quotes would count as an absent one.

    Args:
        folder: The model's.
        config: Its config.json.
    """
    text = config.get("text_config")
    parts = {"": config} | ({"text_config.": text} if is_mapping(text) else {})
    for prefix, part in parts.items():
        for name in (*SIZES, "model_type"):
            value, words = part.get(name), "a text" if name == "model_type" else f"a whole number from 0 to {LARGEST:,}"
            if value is None or (isinstance(value, str) if name == "model_type" else _is_size(value)):
                continue
            yield Problem(
                what=f"{prefix}{name} in config.json is {value!a:.60}; it has to be {words}.",
                where=f"{folder / 'config.json'} {prefix}{name}",
                why="Layers, memory and sizes are counted with it, and transformers chooses the model's class by it.",
                next="Download config.json again, or write it as the release's card says.",
            )


def _is_size(value: object) -> bool:
    """A size that a model can have, or one for each layer."""
    return is_list(value) or (type(value) is int and 0 <= value <= LARGEST)


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that config.json names first."""
    named = config.get("architectures")
    return str(named[0]) if is_list(named) and named else None


def encoder_decoder(folder: Path) -> Problem:
    """T5, BART, Whisper: an encoder reads the input."""
    return Problem(
        what="The base is an encoder-decoder, not a causal language model.",
        where=f"{folder / 'config.json'} is_encoder_decoder",
        why="An encoder reads the prompt there; rows of chat are one stream of tokens here, and no engine of "
        "recipes/schemes serves its 4-bit files.",
        next="Name a causal language model (AutoModelForCausalLM loads it).",
    )


def no_config(folder: Path) -> Problem:
    """Its config.json is absent or unreadable; an adapter has none."""
    path = folder / "config.json"
    adapter = (folder / "adapter_config.json").exists()
    return Problem(
        what="config.json is not readable JSON." if path.exists() else "The base has no config.json.",
        where=str(path if path.exists() else folder),
        why="It is an adapter, not a base model." if adapter else "It names the architecture and its sizes.",
        next="Name the base that the adapter was trained on."
        if adapter
        else "Name a model folder as transformers' save_pretrained writes it.",
    )


def no_tokenizer(folder: Path) -> Problem:
    """None of the files of a tokenizer is there."""
    return Problem(
        what="The base has no tokenizer.",
        where=str(folder),
        why=f"None of {', '.join(TOKENIZERS)} is there, so no row can become tokens.",
        next="Copy the tokenizer files of the base into its folder.",
    )


def _quantized_already(folder: Path, config: Mapping[str, Any]) -> Problem:
    quantization = config["quantization_config"]
    method = str(quantization.get("quant_method", "")) if is_mapping(quantization) else ""
    maker = DEQUANTIZERS.get(method)
    return Problem(
        what=f"The base is quantized already{f' ({method})' if method else ''}.",
        where=f"{folder / 'config.json'} quantization_config",
        why="Training quantizes the original weights to NF4, and merging needs them too.",
        next="Name the original bf16, fp16 or fp32 model."
        if maker is None
        else "Name the bf16 release where there is one, or make bf16 weights of these once (host memory for 2 bytes a "
        f"parameter): {dequantize_command(folder, config, maker)} and copy the tokenizer's and processor's files to "
        f"{folder}-bf16.",
    )


def dequantize_command(folder: Path, config: Mapping[str, Any], maker: str) -> str:
    """One line that writes FOLDER-bf16: transformers dequantizes while it loads.

    `save_pretrained` of 5.23 would undo what loading did, and write FP8 again; without `_weight_conversions` it writes
    what the model holds.
    """
    cls = architecture(config) or "AutoModelForCausalLM"
    return (
        f"python -c \"import transformers as t; m = t.{cls}.from_pretrained('{folder}', dtype='bfloat16', "
        f"quantization_config=t.{maker}(dequantize=True)); m._weight_conversions = None; "
        f"m.bfloat16().save_pretrained('{folder}-bf16')\""
    )
