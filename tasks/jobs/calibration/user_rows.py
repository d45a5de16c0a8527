"""Rows in any accepted format -> calibration set, for a model that no recipe made: `quench quantize`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa

from recipes.data.rows import Row, malformed, read_rows
from recipes.models.chat_template import read_template
from tasks.jobs.calibrate import DRAWABLE, calibset
from tasks.jobs.text.chat_template import TemplateSettings
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.rendering import Renderer, Sample
from tasks.jobs.text.tokenizer import load_tokenizer, text_ids
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

ANY_DAY = date(2025, 1, 1)


def run(job: Job) -> dict[str, Any]:
    """Render rows with the model's template (texts as they are), draw, pack. The same inputs give the same bytes.

    Reads:
        rows: a file or folder of rows. tokenizer: tokenizer files of the model.
    Writes:
        What tasks.jobs.calibrate writes.
    Metrics:
        None.

    Raises:
        StageError: Malformed rows, rows that the template refuses, no template for rows with turns; too few rows or
            tokens.
    """
    path = job.inputs["rows"].path
    read = read_rows(path)
    if read.problems:
        raise StageError(read.problems[0])
    unique = {row.name: row for row in reversed(read.rows)}
    records = list(_texts(unique, job) if read.format == "text" else _turns(unique, job, path=path))
    job.events.note(
        "rows",
        f"{len(read.rows)} of the form {read.format}, {len(read.rows) - len(unique)} of them repeated; "
        f"{len(records)} fit {job.params['seq_len']} tokens",
    )
    return calibset(pa.Table.from_pylist(records, schema=DRAWABLE), None, job=job)


def _texts(rows: dict[str, Row], job: Job) -> Iterator[dict[str, Any]]:
    """Texts as the tokenizer makes them, cut at seq_len; no template renders them."""
    tokenizer = load_tokenizer(job.inputs["tokenizer"].path)
    cut = 0
    for name, row in sorted(rows.items()):
        ids = text_ids(tokenizer, row.messages[0]["content"])
        cut += len(ids) > job.params["seq_len"]
        yield _record(name, row.messages, ids[: job.params["seq_len"]])
    if cut:
        job.events.note("cut", f"{cut} texts are over {job.params['seq_len']} tokens: their beginnings are used")


def _turns(rows: dict[str, Row], job: Job, *, path: Path) -> Iterator[dict[str, Any]]:
    """Conversations as the model's template renders them; leading turns go where they do not fit."""
    folder = job.inputs["tokenizer"].path
    said = TemplateSettings.read(folder)
    # A template that prints today's date gets one day, so that the same inputs give the same bytes.
    day = said.day or (ANY_DAY if read_template(folder).prints_today else None)
    renderer = Renderer.open(folder, settings=replace(said, day=day))
    wrong: list[str] = []
    for name, row in sorted(rows.items()):
        try:
            chat = Conversation.of(row.messages, row.tools)
            samples = renderer.samples(chat, max_length=job.params["seq_len"])
        except RowError as error:
            wrong.append(f"{row.where} {error}")
            continue
        for sample in samples[-1:]:  # where each turn is a sample, the last one holds all
            if isinstance(sample, Sample):
                yield _record(name, sample.turns, sample.rendered.input_ids)
    if wrong:
        raise StageError(malformed([path], wrong))


def _record(name: str, messages: list[dict[str, Any]], ids: list[int]) -> dict[str, Any]:
    return {"row": name, "domain": "", "messages": json.dumps(messages, ensure_ascii=False), "input_ids": ids}
