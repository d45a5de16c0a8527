"""Plain texts -> records of the dataset: every token is trained, and there is no prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipes.data.files import FolderChoice
from recipes.data.formats import TEXT
from recipes.data.rows import Row, content_hash
from recipes.data.texts import plain_texts
from tasks.jobs.text.rendering import Rendered, Renderer
from tasks.jobs.text.sources import place_of
from tasks.jobs.text.tokenizer import with_end
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def read_texts(path: Path, *, what: str) -> Iterator[tuple[str, str]]:
    """Name and text of every row with a column `text`, in a file of any kind; the name is a hash of the text.

    Raises:
        StageError: A row has no text; `what` names the file's purpose.
    """
    try:
        for where, text, wrong in plain_texts(path):
            if text is None:
                raise StageError.of(
                    what=f"malformed row in {what}",
                    where=where,
                    why=f"it {wrong}",
                    next=f'correct or remove it in {path}; rows are {{"text": "..."}}',
                )
            yield content_hash([{"role": TEXT, "content": text}])[:16], text
    except FolderChoice as choice:
        raise StageError(choice.problem(str(path), written="nowhere")) from None


class Texts(NamedTuple):
    """Records of rows.parquet, and the tokens that each cut text lost."""

    records: list[dict[str, Any]]
    lost: list[int]


def text_records(job: Job, rows: dict[str, Row], renderer: Renderer) -> Texts:
    """Tokens of every text as the tokenizer makes them, then the end-of-text token; cut at max_length.

    `prompt_ids` and `answer` are empty: evaluate measures loss and KL on these rows and decodes no answers.
    """
    params, texts = job.params, Texts([], [])
    for name, row in sorted(rows.items()):
        ids = with_end(renderer.tokenizer, renderer.tokenizer(row.messages[0]["content"])["input_ids"])
        kept = ids[: params["max_length"]]
        if len(kept) < len(ids):
            texts.lost.append(len(ids) - len(kept))
        text = renderer.tokenizer.decode(kept) if len(kept) < len(ids) else row.messages[0]["content"]
        texts.records.append(
            {
                "row": name,
                **place_of(row, params)._asdict(),
                "messages": json.dumps([{"role": TEXT, "content": text}], ensure_ascii=False, sort_keys=True),
                "tools": "",
                "source": row.where,
                "input_ids": kept,
                "completion_mask": [True] * len(kept),
                "prompt_ids": [],
                "answer": "",
                "columns": json.dumps(row.columns, ensure_ascii=False),
                "dropped_turns": 0,
                "turn": 0,
            }
        )
        if len(texts.records) == 1:
            example = Rendered(input_ids=kept, mask=[True] * len(kept), prompt_ids=[], way="all tokens")
            job.events.note(
                "example text", f"{row.where}, trained tokens between ⟦ and ⟧:\n{renderer.marked_text(example)}"
            )
    if texts.records:
        job.events.note(
            "plain text",
            f"{len(rows)} rows: every token is trained, none goes through the chat template; they have no prompt, so "
            "they are in loss, perplexity and KL but not in the task score",
        )
    return texts
