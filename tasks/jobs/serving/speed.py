"""How fast an engine serves: at 1, 8 and 32 requests at once, as its clients see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from recipes.schemes.limits import GIB
from tasks.jobs.serving.client import Client, Timed

REQUESTS = (1, 8, 32)  # at once: one user, a few, a busy card


def loads(
    client: Client,
    dataset: Path,
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    on_repeat: Callable[[], None],
) -> list[dict[str, Any]]:
    """What served.json holds under `loads`: seconds and tokens/s of each repeat, after one that is not timed.

    prefill_tokens_per_s: tokens of all prompts, by the time until the last request had its first token.
    output_tokens_per_s: tokens of all answers, by the time until the last one ended (prompts included), as vLLM's own
    benchmark counts them. From first to last token would not do: a busy server sends several tokens at once.
    ttft_s: seconds from sending to the first token, of every request.
    """
    prompts = _prompts(dataset, prompt_tokens, count=sum(REQUESTS) * (repeats + 1))
    lines: list[dict[str, Any]] = []
    for requests in REQUESTS:
        rounds: list[list[Timed]] = []
        for repeat in range(repeats + 1):
            timed = client.stream([next(prompts) for _ in range(requests)], new_tokens=new_tokens)
            if repeat:
                rounds.append(timed)
            on_repeat()
        lines.append(
            {
                "requests": requests,
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "prefill_tokens_per_s": [
                    requests * prompt_tokens / max(answer.first for answer in timed) for timed in rounds
                ],
                "output_tokens_per_s": [
                    requests * new_tokens / max(answer.last for answer in timed) for timed in rounds
                ],
                "ttft_s": [answer.first - answer.sent for timed in rounds for answer in timed],
                "seconds": [max(answer.last for answer in timed) for timed in rounds],
            }
        )
    return lines


def _prompts(dataset: Path, length: int, *, count: int) -> Iterator[list[int]]:
    """Stretches of the rows' tokens, one after the other: no two are equal, so that no cached prefix helps.

    Args:
        dataset: The dataset.
        length: Tokens of a stretch.
        count: How many are asked for: no more rows are read than they take.
    """
    ids: list[int] = []
    with pq.ParquetFile(dataset / "rows.parquet") as file:
        for rows in file.iter_batches(columns=["input_ids"]):
            ids += rows["input_ids"].flatten()[: count * length - len(ids)].to_pylist()
            if len(ids) == count * length:
                break
    start, shift = 0, 0
    ids *= -(-length // len(ids)) + 1
    while True:
        if start + length > len(ids):
            shift += 1
            start = shift % length
        yield ids[start : start + length]
        start += length


def resident_gib(group: int) -> float:
    """Memory of all processes of a group, GiB; pages that several hold are counted once (PSS)."""
    total = 0
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            continue
    return total / GIB
