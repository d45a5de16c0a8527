"""The files of a model or adapter folder that make its tokenizer and its processor; they travel byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

TEMPLATE_SETTINGS = "chat_template_args.json"  # ours: the arguments and the day that rows were rendered with
# What turns images, audio and video into a model's inputs: it goes wherever the tokenizer goes, and its digest counts.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
TOKENIZER_FILES = (
    "tokenizer.*",  # .json, and .model, .model.v3 ... of SentencePiece
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "tekken.json",  # Mistral's
    "chat_template.*",
    "chat_templates/*",
    "additional_chat_templates/*",
    *PROCESSOR_FILES,
    TEMPLATE_SETTINGS,
)


def copy_files(source: Path, out: Path, patterns: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copy what matches, by its path below `source`; what `out` has already is replaced."""
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        target = out / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
