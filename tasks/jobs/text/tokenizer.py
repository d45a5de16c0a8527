"""A tokenizer from a folder: local files only, and no code from the folder is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import AutoTokenizer

# Where splittings of a text differ: numbers, blanks and line ends in a row, contractions, letters beyond ASCII.
PROBES: Final = (
    "in 1990 and 2024",
    "a  b\n\n c\t d",
    "Don't we'll I'M",
    "naïve 漢字 😀",
    " leading",
    "x = [1, 2];\n    return x",
)


def load_tokenizer(folder: Path) -> Any:
    """A PreTrainedTokenizerBase; its stubs do not know what a call returns.

    A template that stands in chat_template.json alone, where transformers reads it for processors, is read too.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = template_of_processor(folder)
    return tokenizer


def template_of_processor(folder: Path) -> str | None:
    """What chat_template.json holds, if it is there."""
    path = folder / "chat_template.json"
    return json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.exists() else None


def reads_alike(tokenizer: Any, other: Any) -> bool:
    """Two tokenizers give the same ids for every text: they are the same program, or the same slow class and words."""
    if tokenizer.is_fast and other.is_fast:
        return tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    return type(tokenizer) is type(other) and tokenizer.get_vocab() == other.get_vocab()


def unlike_its_file(tokenizer: Any, folder: Path) -> str | None:
    """A text for which a tokenizer gives other ids than the folder's tokenizer.json alone; None where there is none.

    transformers picks a class by the model type and builds its own splitting of a text; tokenizer.json says another.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    plain = Tokenizer.from_file(str(path))
    return next(
        (text for text in PROBES if _ids(tokenizer, text) != plain.encode(text, add_special_tokens=False).ids), None
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
