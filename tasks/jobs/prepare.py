"""Raw rows of any number -> dataset: de-duplicated, split, tokenised, with the completion mask."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.checks.rows import too_few
from recipes.data.rows import SIDES
from recipes.data.wrong import Wrong
from recipes.schema import FEWEST_ROWS
from tasks.jobs.loading.load import setup
from tasks.jobs.preparing.reading import Progress, ReadSources, read_sources
from tasks.jobs.preparing.records import ROWS, Tally
from tasks.jobs.preparing.renderer import open_renderer, unsound
from tasks.jobs.preparing.selection import Selection, select
from tasks.jobs.preparing.telling import Examples, tell_cut, tell_masks
from tasks.jobs.preparing.workers import ChunkRenderer
from tasks.jobs.preparing.writing import Counts, RecordFile, write_rows
from tasks.jobs.text.plain_texts import read_texts
from tasks.jobs.text.rendering import Renderer
from tasks.jobs.text.tokenizer import load_tokenizer, reads_alike, template_of_processor, text_ids, unlike_its_file
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.tokenizer_files import copy_files

__all__ = ["GENERAL", "ROWS", "run"]

GENERAL = pa.schema([("row", pa.string()), ("input_ids", pa.list_(pa.int32())), ("n_chars", pa.int32())])


def run(job: Job) -> dict[str, Any]:
    """Make the dataset.

    Reads:
        data, data-1 ...: one file or folder per source. general: JSONL with `text` (may be absent). tokenizer: base
        model folder. template: Jinja file (may be absent).
    Writes:
        rows.parquet, general.parquet, tokenizer/ (byte-for-byte copies), summary.json.
    Metrics:
        None; counts are in the summary and in notes.

    Raises:
        StageError: Malformed rows (the first 20, by line), rows that the template cannot mask, an empty split.
    """
    setup(job)
    renderer = open_renderer(job)
    with tempfile.TemporaryDirectory(dir=job.out, prefix="scratch-") as scratch:
        summary = _rows(job, renderer, Path(scratch))
    general = _general(job, renderer)
    pq.write_table(pa.Table.from_pylist(general, schema=GENERAL), job.out / "general.parquet")
    _write_tokenizer(job, renderer)
    summary["rows"]["general"] = len(general)
    summary["tokens"]["general"] = sum(len(row["input_ids"]) for row in general)
    job.write_json("summary.json", summary)
    job.events.note("rows", ", ".join(f"{name} {count}" for name, count in summary["rows"].items()))
    job.events.note(
        "left out",
        f"{summary['duplicates']} duplicates, {summary['too_long_rows']} rows whose last exchange alone is over "
        f"{job.params['max_length']} tokens; {summary['truncated_rows']} rows lost leading turns",
    )
    return summary


def _rows(job: Job, renderer: Renderer, scratch: Path) -> dict[str, Any]:
    """Write rows.parquet; its part of the summary."""
    reads = read_sources(job, scratch)
    selection = select(job, reads, scratch)
    records = RecordFile(scratch / "records.arrow")
    tally = _render(job, reads, selection, renderer, records)
    keep = records.distinct()
    counts = records.count(keep)
    _check_splits(counts, job)
    summary = {
        "rows": counts.rows,
        "groups": counts.groups,
        "duplicates": selection.duplicates + len(records) - sum(counts.rows.values()),
        "too_long_rows": len(tally.too_long),
        "format": reads.format,
        "detected_from": reads.detected_from,
        "mask_from": dict(sorted(tally.ways.items())),
    }
    summary |= selection.counts | tell_cut(job, tally)
    return summary | write_rows(records.batches(keep), job.out / "rows.parquet")


def _render(job: Job, reads: ReadSources, selection: Selection, renderer: Renderer, records: RecordFile) -> Tally:
    """Every row as one record, or one per trained turn.

    Raises:
        StageError: Rows without a sound mask, the first 20 named.
    """
    tally, wrong, seam = Tally(), Wrong(), None
    progress = Progress(job.events, note="tokenising", total=len(selection.places))
    examples = Examples(job, renderer)
    chunks = ChunkRenderer(reads.spool, renderer, job.params["max_length"])
    for size, batch, rows in chunks.chunks(selection.places, processes=job.execution.threads):
        examples.tell(rows)
        tally.add(rows.tally)
        for line in rows.wrong:
            wrong.add(line)
        seam = seam or rows.seam
        records.write(batch, rows.keys)
        progress.step(size)
    if wrong.count:
        raise unsound(wrong.lines, renderer, count=wrong.count, seam=seam)
    tell_masks(job, tally, renderer)
    return tally


def _check_splits(counts: Counts, job: Job) -> None:
    """Refuse a split with an empty side, or with next to nothing to train on."""
    empty = [name for name in SIDES if not counts.rows[name]]
    if empty:
        rows = sum(counts.rows.values())
        raise StageError.of(
            what=f"{' and '.join(empty)} would have no rows",
            where=f"{job.inputs['data'].path.name} ({rows} rows, {counts.all_groups} groups), data.dev, data.test",
            why=f"groups fall on a side by hash; dev has a share of {job.params['dev']}, test {job.params['test']}",
            next="give more rows or finer groups, or larger data.dev and data.test; another data.salt draws again",
        )
    train, params = counts.rows["train"], job.params
    if train < FEWEST_ROWS:
        raise StageError(too_few(train, where=job.inputs["data"].path.name, dev=params["dev"], test=params["test"]))


def _general(job: Job, renderer: Renderer) -> list[dict[str, Any]]:
    """Rows of the general hold-out, cut to max_length tokens, sorted by hash; empty without a file."""
    if "general" not in job.inputs:
        job.events.note("general", "no data.general in the recipe: forgetting is not measured")
        return []
    rows = {}
    path = job.inputs["general"].path
    for name, text in read_texts(path, what="the general hold-out"):
        ids = text_ids(renderer.tokenizer, text)[: job.params["max_length"]]
        if len(ids) > 1:  # the first token has no prediction
            n_chars = len(renderer.tokenizer.decode(ids, skip_special_tokens=True))
            rows[name] = {"row": name, "input_ids": ids, "n_chars": n_chars}
    return [rows[name] for name in sorted(rows)]


def _keep_class(job: Job, renderer: Renderer, out: Path) -> None:
    """Let the copied files be read as the base's are: by the same class, with the same template."""
    base = job.inputs["tokenizer"].path
    if not reads_alike(renderer.tokenizer, load_tokenizer(out)):
        copy_files(base, out, ["config.json"])
        job.events.note("tokenizer", "its class depends on config.json: a copy stands beside it, wherever it goes")
    jinja = out / "chat_template.jinja"
    if (
        (template := template_of_processor(base))
        and template == renderer.tokenizer.chat_template
        and not jinja.exists()
    ):
        jinja.write_text(template, encoding="utf-8")
        job.events.note("chat template", "it stood in chat_template.json alone; chat_template.jinja is for engines")
    if (text := unlike_its_file(renderer.tokenizer, base)) is not None:
        job.events.note(
            "tokenizer.json",
            f"transformers reads this base as {type(renderer.tokenizer).__name__}, which splits texts otherwise than "
            f"its tokenizer.json says: {text!r} gets other tokens. An engine that reads that file alone gives others",
        )


def _write_tokenizer(job: Job, renderer: Renderer) -> None:
    """Copy the tokenizer files; add a chosen template; put the end-of-turn token among the ids that end an answer."""
    base, out = job.inputs["tokenizer"].path, job.out / "tokenizer"
    out.mkdir()
    copy_files(base, out)
    renderer.template.settings.write(out)
    _keep_class(job, renderer, out)
    if "template" in job.inputs or job.params.get("chat_template"):
        (out / "chat_template.jinja").write_text(renderer.tokenizer.chat_template, encoding="utf-8")
        job.events.note("chat template", "chosen by the recipe; it travels with every artifact")
    source, target = base / "generation_config.json", out / "generation_config.json"
    text = source.read_text(encoding="utf-8") if source.exists() else "{}"
    config = json.loads(text)
    ends = config.get("eos_token_id", renderer.tokenizer.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    if source.exists() and renderer.end_of_turn in ends:
        target.write_text(text, encoding="utf-8")
        return
    config["eos_token_id"] = [renderer.end_of_turn, *(end for end in ends if end != renderer.end_of_turn)]
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    job.events.note("generation config", f"eos_token_id is now {config['eos_token_id']}, so that an answer ends")
