"""Raw rows -> dataset: de-duplicated, split, tokenised, with the completion mask."""

from __future__ import annotations

import json
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipes.problem import Problem
from recipes.rows import SHOWN, Message, Row, content_hash, side
from tasks.jobs.backends.load import setup
from tasks.jobs.rendering import Renderer, RowError
from tasks.jobs.sources import read_sources, select
from tasks.jobs.texts import text_records
from tasks.runtime.errors import StageError
from tasks.runtime.job import Job

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
ROWS = pa.schema(
    [
        ("row", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("domain", pa.string()),
        ("messages", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.bool_())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("columns", pa.string()),
        ("dropped_turns", pa.int32()),
    ]
)
GENERAL = pa.schema([("row", pa.string()), ("input_ids", pa.list_(pa.int32())), ("n_chars", pa.int32())])


def run(job: Job) -> dict[str, Any]:
    """Make the dataset.

    Reads:
        data, data-1 ...: one file or folder a source. general: JSONL with `text` (may be absent). tokenizer: base
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
    how = "the template's generation markers" if renderer.markers else "the token difference of prefixes"
    events.note("mask", f"completion tokens come from {how}; a turn ends with token {renderer.end_of_turn}")

    reads = read_sources(job)
    every = [row for read in reads for row in read.rows]
    unique = {content_hash(row.messages)[:16]: row for row in reversed(every)}  # the first of equal rows stays
    chosen, selection = select(job, unique)
    rendered, too_long = _render(job, {name: row for name, row in chosen.items() if not row.is_text}, renderer)
    texts = text_records(job, {name: row for name, row in chosen.items() if row.is_text}, renderer)
    rendered += texts.records
    rows = _distinct(rendered)
    _check_splits(rows, job)
    general = _general(job, renderer)
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), job.out / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(general, schema=GENERAL), job.out / "general.parquet")
    _write_tokenizer(job, renderer)
    duplicates = len(every) - len(unique) + len(rendered) - len(rows)
    summary = _summary(rows, general, duplicates=duplicates, too_long=too_long)
    summary |= {"format": reads[0].format, "detected_from": reads[0].detected_from, "mask_from": how}
    summary |= selection | _cut(job, chosen, rendered, renderer=renderer, lost=texts.lost)
    (job.out / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    events.note("rows", ", ".join(f"{name} {count}" for name, count in summary["rows"].items()))
    events.note(
        "left out",
        f"{duplicates} duplicates, {too_long} rows whose last exchange alone is over {params['max_length']} tokens; "
        f"{summary['truncated_rows']} rows lost leading turns",
    )
    return summary


def _cut(
    job: Job, rows: dict[str, Row], records: list[dict[str, Any]], *, renderer: Renderer, lost: list[int]
) -> dict[str, Any]:
    """What max_length takes away: of rows that are cut, and of rows that are left out.

    Args:
        job: The job.
        rows: Source rows by name.
        records: What became of them.
        renderer: Counts the tokens of whole rows.
        lost: Tokens that each cut plain text lost.
    """

    def length(name: str) -> int:
        return len(renderer.tokenizer.apply_chat_template(rows[name].messages, tokenize=True, return_dict=False))

    kept = {one["row"]: len(one["input_ids"]) for one in records if one["dropped_turns"]}
    lost = [*lost, *(length(name) - tokens for name, tokens in kept.items())]
    there = {one["row"] for one in records}
    gone = [length(name) for name, row in rows.items() if name not in there and not row.is_text]
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


def _render(job: Job, rows: dict[str, Row], renderer: Renderer) -> tuple[list[dict[str, Any]], int]:
    """Every row as a record of rows.parquet, and how many were too long.

    Raises:
        StageError: Rows without a sound mask, the first 20 named.
    """
    params, events = job.params, job.events
    done: list[dict[str, Any]] = []
    wrong, too_long = [], 0
    for number, (name, row) in enumerate(sorted(rows.items()), start=1):
        if number % 500 == 0:
            events.progress(number, len(rows), unit="row", note="tokenising")
        try:
            record = _record(row, renderer, max_length=params["max_length"])
        except RowError as error:
            wrong.append(f"{row.where} {error}")
            continue
        if record is None:
            too_long += 1
            continue
        group = str(row.columns[params["group"]]) if params.get("group") else name
        domain = row.domain(params.get("domain"))
        split = side(group, salt=params["salt"], dev=params["dev"], test=params["test"])
        done.append({"row": name, "group": group, "split": split, "domain": domain, **record})
        if len(done) == 1:
            example = renderer.render(json.loads(record["messages"]))
            events.note("example", f"{row.where}, trained tokens between ⟦ and ⟧:\n{renderer.marked_text(example)}")
    if wrong:
        more = f"\n    and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise StageError(
            Problem(
                what=f"{len(wrong)} row(s) have completions that cannot be told from their prompts",
                where=wrong[0].split(" ", 1)[0],
                why="the loss would fall on the wrong tokens:\n    " + "\n    ".join(wrong[:SHOWN]) + more,
                next="use a chat template with {% generation %} markers, or correct these rows",
            )
        )
    return done, too_long


def _record(row: Row, renderer: Renderer, *, max_length: int) -> dict[str, Any] | None:
    """Token ids and mask of a row, leading exchanges dropped until it fits; None where the last one does not fit."""
    for messages in _shorter(row.messages):
        rendered = renderer.render(messages)
        if len(rendered.input_ids) <= max_length:
            return {
                "messages": json.dumps(messages, ensure_ascii=False, sort_keys=True),
                "input_ids": rendered.input_ids,
                "completion_mask": rendered.mask,
                "prompt_ids": renderer.prompt(messages),
                "answer": messages[-1]["content"],
                "columns": json.dumps(row.columns, ensure_ascii=False, sort_keys=True),
                "dropped_turns": len(row.messages) - len(messages),
            }
    return None


def _shorter(messages: list[Message]) -> Iterable[list[Message]]:
    """The conversation, then without its first exchange, its first two ...; leading system turns go last of all."""
    head = next(i for i, turn in enumerate(messages) if turn["role"] not in ("system", "developer"))
    starts = [i for i, turn in enumerate(messages) if turn["role"] == "user" and i > head]
    yield messages
    for start in starts:
        yield messages[:head] + messages[start:]
    if head:
        yield messages[starts[-1] if starts else head :]


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose text and token ids are unique over all splits, sorted by split and row.

    Rows that differed only in dropped turns are equal now; the copy in test stays, so that no test row is in train.
    """
    kept, seen = [], set[object]()
    for record in sorted(rows, key=lambda one: (("test", "dev", "train").index(one["split"]), one["row"])):
        keys = {content_hash(json.loads(record["messages"])), tuple(record["input_ids"])}
        if not keys & seen:
            kept.append(record)
        seen |= keys
    return sorted(kept, key=lambda one: (one["split"], one["row"]))


def _check_splits(rows: list[dict[str, Any]], job: Job) -> None:
    """Refuse a split with an empty side."""
    counts = Counter(record["split"] for record in rows)
    empty = [name for name in ("train", "dev", "test") if not counts[name]]
    if empty:
        groups = len({record["group"] for record in rows})
        raise StageError(
            Problem(
                what=f"{' and '.join(empty)} would have no rows",
                where=f"{job.inputs['data'].path.name} ({len(rows)} rows, {groups} groups), data.dev, data.test",
                why=f"groups fall on a side by hash; dev has a share of {job.params['dev']}, test {job.params['test']}",
                next="give more rows or finer groups, or larger data.dev and data.test; another data.salt draws again",
            )
        )


def _general(job: Job, renderer: Renderer) -> list[dict[str, Any]]:
    """Rows of the general hold-out, cut to max_length tokens, sorted by hash; empty where there is no file."""
    if "general" not in job.inputs:
        job.events.note("general", "no data.general in the recipe: forgetting is not measured")
        return []
    found = {}
    path = job.inputs["general"].path
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            text = json.loads(line)["text"]
            ids = renderer.tokenizer(text)["input_ids"][: job.params["max_length"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(
                Problem(
                    what="malformed row in the general hold-out",
                    where=f"{path.name}:{number}",
                    why=f'rows are {{"text": ...}} ({error!r})',
                    next=f"correct line {number} of {path}",
                )
            ) from None
        if len(ids) > 1:  # the first token has no prediction
            name = content_hash([{"role": "text", "content": text}])[:16]
            n_chars = len(renderer.tokenizer.decode(ids, skip_special_tokens=True))
            found[name] = {"row": name, "input_ids": ids, "n_chars": n_chars}
    return [found[name] for name in sorted(found)]


def _write_tokenizer(job: Job, renderer: Renderer) -> None:
    """Copy the tokenizer files; add a chosen template; put the end-of-turn token among the ids that end an answer."""
    base, out = job.inputs["tokenizer"].path, job.out / "tokenizer"
    out.mkdir()
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    if (base / "chat_templates").is_dir():
        shutil.copytree(base / "chat_templates", out / "chat_templates")
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
        "domains": {name: dict(sorted(Counter(one["domain"] for one in by_split[name]).items())) for name in splits},
        "tokens": {name: sum(len(one["input_ids"]) for one in by_split[name]) for name in splits}
        | {"general": sum(len(one["input_ids"]) for one in general)},
        "completion_tokens": {name: sum(sum(one["completion_mask"]) for one in by_split[name]) for name in splits},
        "length_tokens": {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90, 99, 100)},
        "duplicates": duplicates,
        "too_long_rows": too_long,
        "truncated_rows": sum(record["dropped_turns"] > 0 for record in rows),
        "dropped_turns": sum(record["dropped_turns"] for record in rows),
    }
