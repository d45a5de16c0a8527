"""What prepare says of the rows that it rendered: an example of each kind, how they are masked, what was cut."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.jobs.preparing.records import Record, RenderedRows, Tally
from tasks.jobs.text.rendering import ONE_A_TURN, Rendered, Renderer
from tasks.runtime.process.job import Job


class Examples:
    """The first record with turns and the first plain text, each told once."""

    def __init__(self, job: Job, renderer: Renderer) -> None:
        self._job, self._renderer = job, renderer
        self._told: set[bool] = set()

    def tell(self, rows: RenderedRows) -> None:
        """Note what is the first of its kind, trained tokens marked."""
        for is_text, record in rows.first.items():
            if is_text not in self._told:
                self._told.add(is_text)
                self._note("example text" if is_text else "example", record)

    def _note(self, about: str, record: Record) -> None:
        example = Rendered(
            input_ids=record["input_ids"], mask=record["completion_mask"], prompt_ids=[], way="all tokens"
        )
        text = self._renderer.marked_text(example)
        self._job.events.note(about, f"{record['source']}, trained tokens between ⟦ and ⟧:\n{text}")


def tell_masks(job: Job, tally: Tally, renderer: Renderer) -> None:
    """Note how trained tokens were found, for how many rows, and what samples of single turns cost."""
    how = ", ".join(f"{way} ({count} rows)" for way, count in tally.ways.most_common())
    job.events.note("mask", f"completion tokens come from {how}; a turn ends with token {renderer.end_of_turn}")
    if tally.single["samples"]:
        job.events.note(
            "samples",
            "the template renders earlier turns otherwise than the last, so that each assistant turn of "
            f"{tally.ways[ONE_A_TURN]} rows is a sample with its own history: {tally.single['samples']} samples of "
            f"{tally.single['tokens']} tokens, where the last ones alone, which hold all turns, have "
            f"{tally.single['last_tokens']}",
        )
    if tally.forms:
        forms = "; ".join(f"{form} ({count} rows)" for form, count in tally.forms.most_common())
        job.events.note("form", f"the chat template is given {forms}")
    if tally.texts:
        job.events.note(
            "plain text",
            f"{tally.texts} rows: every token is trained, none goes through the chat template; they have no prompt, so "
            "they are in loss, perplexity and KL but not in the task score",
        )


def tell_cut(job: Job, tally: Tally) -> dict[str, Any]:
    """Note what max_length takes away, tokens of samples that are cut and of samples left out; for the summary."""
    lost, gone, limit = np.array(tally.lost), np.array(tally.too_long), job.params["max_length"]
    median = float(np.median(lost)) if len(lost) else 0
    cut = {
        "rows": len(lost),
        "tokens": int(lost.sum()),
        "median_tokens": median,
        "most_tokens": int(lost.max(initial=0)),
    }
    if len(lost):
        job.events.note(
            "long rows",
            f"{len(lost)} rows were over {limit} tokens and lost {cut['tokens']} tokens: {median:g} at "
            f"the median, {cut['most_tokens']} at most",
        )
    if len(gone):
        job.events.note(
            "too long",
            f"{len(gone)} rows of {gone.sum()} tokens are left out: their last exchange alone is over {limit}",
        )
    return {"cut": cut, "too_long_tokens": int(gone.sum())}
