"""Raw rows -> dataset: de-duplicated, split, tokenised, with the completion mask."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipes.data.rows import Row, content_hash, first_lines
from tasks.jobs.loading.load import setup
from tasks.jobs.text.conversation import Conversation, RowError, behind_thinking
from tasks.jobs.text.plain_texts import read_texts, text_records
from tasks.jobs.text.rendering import ONE_A_TURN, Renderer, Sample, TooLong
from tasks.jobs.text.sources import place_of, read_sources, select
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.tokenizer_files import copy_files

ROWS = pa.schema(
    [
        ("row", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("domain", pa.string()),
        ("messages", pa.string()),
        ("tools", pa.string()),  # JSON; empty where the row has none
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.bool_())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("columns", pa.string()),
        ("dropped_turns", pa.int32()),
        ("source", pa.string()),  # file and line
        ("turn", pa.int32()),  # number of the one turn that is trained; 0 where all assistant turns are
    ]
)
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
        StageError: Malformed rows (all, by line), rows that the template cannot mask, an empty split.
    """
    setup(job)
    params, events = job.params, job.events
    template = params.get("chat_template")
    if "template" in job.inputs:
        template = job.inputs["template"].path.read_text(encoding="utf-8")
    renderer = Renderer.open(job.inputs["tokenizer"].path, template=template)
    reads = read_sources(job)
    every = [row for read in reads for row in read.rows]
    unique = {row.name: row for row in reversed(every)}  # the first of equal rows stays
    chosen, selection = select(job, unique)
    chats = _render(job, {name: row for name, row in chosen.items() if not row.is_text}, renderer)
    texts = text_records(job, {name: row for name, row in chosen.items() if row.is_text}, renderer)
    rendered = [*chats.records, *texts.records]
    rows = _distinct(rendered)
    _check_splits(rows, job)
    general = _general(job, renderer)
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), job.out / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(general, schema=GENERAL), job.out / "general.parquet")
    _write_tokenizer(job, renderer)
    duplicates = len(every) - len(unique) + len(rendered) - len(rows)
    summary = _summary(rows, general, duplicates=duplicates, too_long=len(chats.too_long))
    summary |= {"format": reads[0].format, "detected_from": reads[0].detected_from, "mask_from": chats.ways}
    summary |= selection | _cut(job, lost=[*chats.lost, *texts.lost], gone=chats.too_long)
    job.write_json("summary.json", summary)
    events.note("rows", ", ".join(f"{name} {count}" for name, count in summary["rows"].items()))
    events.note(
        "left out",
        f"{duplicates} duplicates, {len(chats.too_long)} rows whose last exchange alone is over {params['max_length']} "
        f"tokens; {summary['truncated_rows']} rows lost leading turns",
    )
    return summary


class _RenderedRows(NamedTuple):
    """All rows with turns, rendered.

    Attributes:
        records: Of rows.parquet.
        lost: Tokens that each cut sample lost.
        too_long: Tokens of each sample whose last exchange alone is over the limit.
        ways: Rows by the way in which their trained tokens were found.
    """

    records: list[dict[str, Any]]
    lost: list[int]
    too_long: list[int]
    ways: dict[str, int]


def _cut(job: Job, *, lost: list[int], gone: list[int]) -> dict[str, Any]:
    """What max_length takes away: tokens of samples that are cut, and of samples that are left out."""
    limit = job.params["max_length"]
    if lost:
        job.events.note(
            "long rows",
            f"{len(lost)} rows were over {limit} tokens and lost {sum(lost)} tokens: {statistics.median(lost):g} at "
            f"the median, {max(lost)} at most",
        )
    if gone:
        job.events.note(
            "too long",
            f"{len(gone)} rows of {sum(gone)} tokens are left out: their last exchange alone is over {limit}",
        )
    return {
        "cut": {
            "rows": len(lost),
            "tokens": sum(lost),
            "median_tokens": statistics.median(lost) if lost else 0,
            "most_tokens": max(lost, default=0),
        },
        "too_long_tokens": sum(gone),
    }


def _render(job: Job, rows: dict[str, Row], renderer: Renderer) -> _RenderedRows:
    """Every row as one record of rows.parquet, or one per assistant turn; samples of a row share its group.

    Raises:
        StageError: Rows without a sound mask, the first 20 named.
    """
    params, events = job.params, job.events
    records: list[dict[str, Any]] = []
    lost: list[int] = []
    too_long: list[int] = []
    wrong, ways, skewed = [], Counter[str](), 0
    for number, (name, row) in enumerate(sorted(rows.items()), start=1):
        if number % 500 == 0:
            events.progress(number, len(rows), unit="row", note="tokenising")
        try:
            chat = Conversation.of(row.messages, row.tools)
            fitted = renderer.samples(chat, max_length=params["max_length"])
        except RowError as error:
            wrong.append(f"{row.where} {error}")
            continue
        samples = [sample for sample in fitted if isinstance(sample, Sample)]
        too_long += [sample.tokens for sample in fitted if isinstance(sample, TooLong)]
        lost += [sample.lost for sample in samples if sample.dropped]
        place = place_of(row, params)._asdict()
        if samples and not records:
            text = renderer.marked_text(samples[0].rendered)
            events.note("example", f"{row.where}, trained tokens between ⟦ and ⟧:\n{text}")
        records += [
            {"row": f"{name}.{sample.turn}" if sample.turn else name, **place, **_record(row, sample, renderer)}
            for sample in samples
        ]
        ways.update({sample.rendered.way for sample in samples})
        skewed += any(sample.rendered.skewed for sample in samples)
    if wrong:
        raise StageError.of(
            what=f"{len(wrong)} row(s) have completions that cannot be found among their tokens",
            where=wrong[0].split(" ", 1)[0],
            why=f"the loss would fall on the wrong tokens:{first_lines(wrong)}",
            next="use a chat template with {% generation %} markers, or correct these rows",
        )
    _note_masks(job, records, ways, skewed=skewed, renderer=renderer)
    return _RenderedRows(records, lost, too_long, dict(sorted(ways.items())))


def _note_masks(
    job: Job, records: list[dict[str, Any]], ways: Counter[str], *, skewed: int, renderer: Renderer
) -> None:
    """Note how trained tokens were found, for how many rows, and what samples of single turns cost."""
    how = ", ".join(f"{way} ({count} rows)" for way, count in ways.most_common())
    job.events.note("mask", f"completion tokens come from {how}; a turn ends with token {renderer.end_of_turn}")
    single = [len(record["input_ids"]) for record in records if record["turn"]]
    if single:
        last = sum(len(record["input_ids"]) for record in records if record["turn"] and record["prompt_ids"])
        job.events.note(
            "samples",
            "the template renders earlier turns otherwise than the last, so that each assistant turn of "
            f"{ways[ONE_A_TURN]} rows is a sample with its own history: {len(single)} samples of {sum(single)} tokens, "
            f"where the last ones alone, which hold all turns, have {last}",
        )
    if skewed:
        job.events.note(
            "generation prompt",
            f"{skewed} rows do not begin their last completion as the template's generation prompt does: answers are "
            "decoded from another beginning than was trained",
        )


def _record(row: Row, sample: Sample, renderer: Renderer) -> dict[str, Any]:
    """What rows.parquet holds of a sample. Only the one with the row's last turn has a prompt, to be answered."""
    rendered, turn = sample.rendered, sample.turns[-1]
    answer = behind_thinking(turn.get("content") or "")
    if turn.get("tool_calls"):  # the text of a call is the template's
        answer = renderer.completion(rendered)
    return {
        "messages": json.dumps(
            sample.turns, ensure_ascii=False
        ),  # keys in their order: templates write calls as they are
        "tools": json.dumps(row.tools, ensure_ascii=False) if row.tools else "",
        "source": row.where,
        "input_ids": rendered.input_ids,
        "completion_mask": rendered.mask,
        "prompt_ids": rendered.prompt_ids if sample.last else [],
        "answer": answer if sample.last else "",
        "columns": json.dumps(row.columns, ensure_ascii=False),
        "dropped_turns": sample.dropped,
        "turn": sample.turn,
    }


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose text and token ids are unique over all splits, sorted by split and row.

    Rows that differed only in dropped turns are equal now; the copy in test stays, so that no test row is in train.
    So are samples of conversations with the same beginning: the one with an answer to score stays.
    """
    order = ("test", "dev", "train")
    kept, seen = [], set[object]()
    for record in sorted(rows, key=lambda row: (order.index(row["split"]), not row["prompt_ids"], row["row"])):
        keys = {content_hash(json.loads(record["messages"])), tuple(record["input_ids"])}
        if not keys & seen:
            kept.append(record)
        seen |= keys
    return sorted(kept, key=itemgetter("split", "row"))


def _check_splits(rows: list[dict[str, Any]], job: Job) -> None:
    """Refuse a split with an empty side."""
    counts = Counter(record["split"] for record in rows)
    empty = [name for name in ("train", "dev", "test") if not counts[name]]
    if empty:
        groups = len({record["group"] for record in rows})
        raise StageError.of(
            what=f"{' and '.join(empty)} would have no rows",
            where=f"{job.inputs['data'].path.name} ({len(rows)} rows, {groups} groups), data.dev, data.test",
            why=f"groups fall on a side by hash; dev has a share of {job.params['dev']}, test {job.params['test']}",
            next="give more rows or finer groups, or larger data.dev and data.test; another data.salt draws again",
        )


def _general(job: Job, renderer: Renderer) -> list[dict[str, Any]]:
    """Rows of the general hold-out, cut to max_length tokens, sorted by hash; empty without a file."""
    if "general" not in job.inputs:
        job.events.note("general", "no data.general in the recipe: forgetting is not measured")
        return []
    rows = {}
    path = job.inputs["general"].path
    for name, text in read_texts(path, what="the general hold-out"):
        ids = renderer.tokenizer(text)["input_ids"][: job.params["max_length"]]
        if len(ids) > 1:  # the first token has no prediction
            n_chars = len(renderer.tokenizer.decode(ids, skip_special_tokens=True))
            rows[name] = {"row": name, "input_ids": ids, "n_chars": n_chars}
    return [rows[name] for name in sorted(rows)]


def _write_tokenizer(job: Job, renderer: Renderer) -> None:
    """Copy the tokenizer files; add a chosen template; put the end-of-turn token among the ids that end an answer."""
    base, out = job.inputs["tokenizer"].path, job.out / "tokenizer"
    out.mkdir()
    copy_files(base, out)
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


def _summary(
    rows: list[dict[str, Any]], general: list[dict[str, Any]], *, duplicates: int, too_long: int
) -> dict[str, Any]:
    """Counts by split and domain, and percentiles of row length in tokens."""
    lengths = [len(record["input_ids"]) for record in rows]
    splits = ("train", "dev", "test")
    by_split = {name: [record for record in rows if record["split"] == name] for name in splits}
    return {
        "rows": {name: len(by_split[name]) for name in splits} | {"general": len(general)},
        "groups": {name: len({record["group"] for record in by_split[name]}) for name in splits},
        "domains": {name: dict(sorted(Counter(row["domain"] for row in by_split[name]).items())) for name in splits},
        "tokens": {name: sum(len(row["input_ids"]) for row in by_split[name]) for name in splits}
        | {"general": sum(len(row["input_ids"]) for row in general)},
        "completion_tokens": {name: sum(sum(row["completion_mask"]) for row in by_split[name]) for name in splits},
        "length_tokens": {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90, 99, 100)},
        "duplicates": duplicates,
        "too_long_rows": too_long,
        "truncated_rows": sum(record["dropped_turns"] > 0 for record in rows),
        "dropped_turns": sum(record["dropped_turns"] for record in rows),
    }
