"""A tokenizer from a folder: local files only, and no code from the folder is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(folder: Path) -> Any:
    """A PreTrainedTokenizerBase; its stubs do not know what a call returns."""
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """A plain text as the tokenizer makes it."""
    return begun_once(tokenizer, tokenizer(text)["input_ids"])


def begun_once(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids with one beginning-of-text token where the tokenizer adds one and the text has it already."""
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids with the end-of-text token behind them, where the tokenizer has one and they do not end with it."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
