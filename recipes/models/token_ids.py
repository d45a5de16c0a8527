"""Token ids that a base's embeddings have no row for: a tokenizer that grew, a padding id of -1.

Training and decoding end in an index error there, or in a CUDA assertion that names nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.models.headers import Headers
from recipes.plain import is_list, is_mapping, json_object
from recipes.problem import Problem

NUMBER = re.compile("[0-9]{1,18}")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def token_problems(headers: Headers) -> list[Problem]:
    """Tokens and padding ids beyond the embeddings of a base.

    A few tokens more than rows are let be where nothing writes them: Gemma 3's text-only models bring the tokenizer of
    the others, with one token for images behind the last row.
    """
    rows = embedding_rows(headers)
    return [*_pad_problems(headers, rows), *_beyond(headers, rows)]


def embedding_rows(headers: Headers) -> int:
    """Rows of the input embeddings; the vocabulary's size where they are not recognised."""
    return max((tensor.shape[0] for tensor in headers.embeddings), default=headers.vocabulary)


def tokens_of(folder: Path) -> dict[str, int]:
    """Token -> id of tokenizer.json and of the tokens that tokenizer_config.json adds; empty for other kinds."""
    tokenizer, config = (json_object(folder / name) or {} for name in ("tokenizer.json", "tokenizer_config.json"))
    model = tokenizer.get("model")
    listed: object = model.get("vocab") if is_mapping(model) else None
    tokens: dict[str, int] = {}
    if is_mapping(listed):
        tokens |= {token: number for token, number in listed.items() if isinstance(number, int)}
    elif is_list(listed):  # Unigram: [[token, score], ...], numbered by place
        tokens |= {str(entry[0]): number for number, entry in enumerate(listed) if is_list(entry) and entry}
    added = tokenizer.get("added_tokens")
    for entry in added if is_list(added) else []:
        if is_mapping(entry) and isinstance(entry.get("id"), int):
            tokens[str(entry.get("content"))] = entry["id"]
    more = config.get("added_tokens_decoder")
    numbered: dict[str, Any] = more if is_mapping(more) else {}
    for number, entry in numbered.items():
        if NUMBER.fullmatch(number) and is_mapping(entry):
            tokens[str(entry.get("content"))] = int(number)
    return tokens


def _beyond(headers: Headers, rows: int) -> Iterator[Problem]:
    tokens = tokens_of(headers.folder)
    beyond = {token: number for token, number in tokens.items() if number >= rows}
    if not beyond:
        return
    written = _written(headers, beyond)
    if not written and _all_special(headers.folder, beyond):
        return
    shown = ", ".join(f"{token} ({number})" for token, number in [*(written or beyond).items()][:3])
    yield Problem(
        what=f"The tokenizer has tokens that the embeddings have no row for: {shown}.",
        where=str(headers.folder / "tokenizer.json"),
        why=f"Its ids reach {max(beyond.values())}, and the embeddings end at {rows - 1}: a row with such a token ends "
        "training in an index error.",
        next="Copy the tokenizer files of the release that the weights are from; or give the embeddings these rows "
        f"(untrained ones): {_resize_command(headers, tokens)}",
    )


def _written(headers: Headers, beyond: Mapping[str, int]) -> dict[str, int]:
    """Those that every row may hold: special tokens by role, what the chat template writes."""
    config = json_object(headers.folder / "tokenizer_config.json") or {}
    written = [value.get("content") if is_mapping(value) else value for name in SPECIAL if (value := config.get(name))]
    named = {value for value in written if isinstance(value, str)}
    source = "\n".join(headers.template.texts)
    return {token: number for token, number in beyond.items() if token in named or (token and token in source)}


def _all_special(folder: Path, beyond: Mapping[str, int]) -> bool:
    """None of them comes out of plain text: only a row that spells one of these names has it."""
    tokenizer = json_object(folder / "tokenizer.json") or {}
    added = tokenizer.get("added_tokens")
    entries = [entry for entry in added if is_mapping(entry)] if is_list(added) else []
    return beyond.keys() <= {str(entry.get("content")) for entry in entries if entry.get("special")}


def _resize_command(headers: Headers, tokens: Mapping[str, int]) -> str:
    folder, size = headers.folder, max(tokens.values()) + 1
    return (
        "python -c \"from transformers import AutoModelForCausalLM as M; m = M.from_pretrained('"
        f"{folder}', dtype='bfloat16'); m.resize_token_embeddings({size}, pad_to_multiple_of=64); "
        f"m.save_pretrained('{folder}-resized')\" and copy the tokenizer's files there."
    )


def _pad_problems(headers: Headers, rows: int) -> Iterator[Problem]:
    """Transformers makes the embedding with this id as its padding row, and generation writes it behind answers."""
    generation = json_object(headers.folder / "generation_config.json") or {}
    raw: dict[str, Any] = {"config.json": headers.config.get("pad_token_id")}
    text = headers.config.get("text_config")
    raw["config.json text_config"] = text.get("pad_token_id") if is_mapping(text) else None
    raw["generation_config.json"] = generation.get("pad_token_id")
    for place, number in raw.items():
        if isinstance(number, int) and not 0 <= number < rows:
            name, _, part = place.partition(" ")
            yield Problem(
                what=f"pad_token_id is {number}; the embeddings have the rows 0 to {rows - 1}.",
                where=f"{headers.folder / name} {part or 'pad_token_id'}",
                why="Decoding in batches writes this id behind every answer that has ended, and no row belongs to it.",
                next=f'Write "pad_token_id": null in {name}, or the id of the tokenizer\'s padding token.',
            )
