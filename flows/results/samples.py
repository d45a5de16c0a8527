"""Answers side by side: a dozen test rows chosen by a rule that knows no taste, and what every arm answered.

The rule (also in report.json): rows of test that have a prompt, in the order of a seeded hash of their name; first
rows on which arms differ in score, then others. The untouched base does not count there: it differs nearly always.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq

from flows.results.read import Run, RunArm

SEED = 20_260_101
ROWS, DIFFERING = 12, 8  # shown in all; of these at most so many because arms differ in score
PROMPT_CHARS = 1_200  # the end of a prompt is kept: the question stands there
ANSWER_CHARS = 1_200
ALIKE = 0.4  # share of words in common from which differences are worth marking one by one
COLUMNS = ("row", "domain", "prompt", "reference", "answer", "score", "error")
LEFT_OUT = ("control", "null")  # roles whose answers decide nothing

Kind = Literal["same", "added", "missing"]


class Piece(NamedTuple):
    """A stretch of an answer beside its reference: in both, only in the answer, or only in the reference."""

    kind: Kind
    text: str


def samples_of(run: Run) -> dict[str, Any] | None:
    """What report.json holds under `samples`; None where no arm has an answer to a test row."""
    answered = {arm.slug: rows for arm in run.arms if arm.role not in LEFT_OUT and (rows := _answers(arm, run))}
    shared = set[str].intersection(*(set(rows) for rows in answered.values())) if answered else set[str]()
    if not shared:
        return None
    counted = [arm.slug for arm in run.arms if arm.slug in answered and arm.role != "base"] or list(answered)
    differing = [row for row in _shuffled(shared) if len({answered[slug][row]["score"] for slug in counted}) > 1]
    first = differing[:DIFFERING]
    more = [row for row in _shuffled(shared) if row not in first][: ROWS - len(first)]
    return {
        "rule": f"rows of test with a prompt that every arm answered, in the order of sha256('{SEED}:' + row): first "
        f"up to {DIFFERING} on which arms other than the untouched base differ in score, then others, {ROWS} in all",
        "seed": SEED,
        "rows": len(shared),
        "differing": len(differing),
        "arms": list(answered),
        "chosen": [_sample(row, answered, row in differing) for row in (*first, *more)],
    }


def _answers(arm: RunArm, run: Run) -> dict[str, dict[str, Any]]:
    """Row -> line of answers.parquet, test only; empty where the arm has none."""
    step = run.step(arm.evaluate)
    path = step.files / "answers.parquet" if step is not None and step.ok and step.files else None
    if path is None or not path.exists():
        return {}
    table = pq.read_table(path, columns=list(COLUMNS), filters=[("split", "==", "test")])
    return {line["row"]: line for line in table.to_pylist()}


def _shuffled(rows: set[str]) -> list[str]:
    return sorted(rows, key=lambda row: hashlib.sha256(f"{SEED}:{row}".encode()).hexdigest())


def _sample(row: str, answered: Mapping[str, Mapping[str, dict[str, Any]]], differ: bool) -> dict[str, Any]:
    """One row; arms that answered the same stand together, in the order of the arms."""
    together: dict[tuple[str, float | None, str | None], list[str]] = {}
    for slug, rows in answered.items():
        line = rows[row]
        together.setdefault((line["answer"], line["score"], line["error"]), []).append(slug)
    first = next(iter(answered.values()))[row]
    return {
        "row": row,
        "domain": first["domain"],
        "why": "arms differ in score" if differ else "drawn",
        "prompt": _end(first["prompt"]),
        "reference": _beginning(first["reference"]),
        "answers": [
            {"arms": slugs, "text": _beginning(text), "score": score, "error": error}
            for (text, score, error), slugs in together.items()
        ],
    }


def _end(text: str) -> str:
    return text if len(text) <= PROMPT_CHARS else f"[{len(text) - PROMPT_CHARS:,} characters] …{text[-PROMPT_CHARS:]}"


def _beginning(text: str) -> str:
    return text if len(text) <= ANSWER_CHARS else f"{text[:ANSWER_CHARS]}… [{len(text) - ANSWER_CHARS:,} characters]"


def marked(reference: str, answer: str) -> list[Piece]:
    """The answer in pieces, compared with the reference by words, spaces and signs.

    Of an answer that shares little with the reference, nothing is marked off: it is all one added piece.
    """
    wanted, got = (_words(text.strip()) for text in (reference, answer))
    matcher = SequenceMatcher(None, wanted, got, autojunk=False)
    if matcher.ratio() < ALIKE:
        return [Piece("added", "".join(got))]
    return list(_pieces(wanted, got, matcher))


def _words(text: str) -> list[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def _pieces(wanted: Sequence[str], got: Sequence[str], matcher: SequenceMatcher[str]) -> Iterator[Piece]:
    for what, start, end, other, last in matcher.get_opcodes():
        if what == "equal":
            yield Piece("same", "".join(got[other:last]))
            continue
        if end > start:
            yield Piece("missing", "".join(wanted[start:end]))
        if last > other:
            yield Piece("added", "".join(got[other:last]))
