"""How much of a difference is noise of arithmetic: null arms, which have another arm's bytes and compute otherwise.

Their differences are no model's doing. A difference between two arms that is no larger than the largest of them is no
larger than what a change of the batch size, of the number of threads or of the attention kernel makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from flows.results.cells import ArmEvidence
from flows.results.comparisons import Comparison
from flows.results.metrics import METRICS, TASK, difference_text
from flows.results.paired import Draw, Paired, differences, paired
from flows.results.read import Run, RunArm
from flows.results.rows import RowScores

SHOWN = ("task", "ppl_test", "kl_mean", "ppl_general", "bits_per_byte", "top1_agreement")
SETTINGS = {"batch": "batch_size", "threads": "threads", "attention": "attention"}  # kind -> its name in the record
NAMES = {"batch": "the batch size", "threads": "the number of threads", "attention": "the attention kernel"}


class Largest(NamedTuple):
    """The largest null difference of one metric of scores.parquet, in its mean: a share, nats or bits."""

    size: float
    arm: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class NullArm:
    """One null arm beside the arm whose files it has.

    Attributes:
        changed: What was other, in words.
        reason: Why it says nothing; None where it does.
        pairs: Published metric -> its rows and the other arm's.
        answers: Greedy answers to rows of test, and how many of them are other than that arm's; None without any.
    """

    arm: RunArm
    changed: str
    reason: str | None
    pairs: Mapping[str, Paired]
    answers: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """All null arms of a run, and the largest difference of each metric of scores.parquet.

    Attributes:
        instructions: Of a CPU, `AVX2` -> arms that were scored with them, where there are several; otherwise empty.
    """

    arms: tuple[NullArm, ...]
    largest: Mapping[str, Largest]
    instructions: Mapping[str, Sequence[str]]


def noise_of(run: Run, evidence: Mapping[str, ArmEvidence]) -> Noise | None:
    """What the null arms of a run say; None where it has none."""
    arms = tuple(_null_arm(arm, run, evidence) for arm in run.arms if arm.null is not None)
    if not arms:
        return None
    largest: dict[str, Largest] = {}
    for null in arms:
        for metric, pair in null.pairs.items():
            source, size = METRICS[metric].source or "", abs(pair.a.sums.value - pair.b.sums.value)
            if source not in largest or size > largest[source].size:
                largest[source] = Largest(size, null.arm.slug, str(null.arm.null))
    return Noise(arms=arms, largest=largest, instructions=_instructions(run))


def _instructions(run: Run) -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = {}
    for arm in run.arms:
        if name := _computed(arm.slug, run).get("instructions"):
            by_name.setdefault(name, []).append(arm.slug)
    return by_name if len(by_name) > 1 else {}


def _null_arm(arm: RunArm, run: Run, evidence: Mapping[str, ArmEvidence]) -> NullArm:
    own, other = evidence[arm.slug], evidence.get(arm.of or "")
    reason = own.failure or (f"{arm.of} is not in this run" if other is None else other.failure)
    changed = ""
    if reason is None:
        changed, reason = _changed(arm, run)
    if other is None or reason is not None:
        return NullArm(arm=arm, changed=changed, reason=reason, pairs={}, answers=None)
    pairs = {
        name: pair
        for name in (*SHOWN, *sorted(metric for metric in own.scores if metric.startswith(TASK)))
        if isinstance(pair := _pair(name, own.scores, other.scores), Paired)
    }
    reason = None if pairs else f"it cannot be paired with {arm.of}: other rows, another device, or one group of rows"
    return NullArm(arm=arm, changed=changed, reason=reason, pairs=pairs, answers=_answers_changed(arm, run))


def _pair(metric: str, own: Mapping[str, RowScores], other: Mapping[str, RowScores]) -> object:
    source = METRICS[metric].source or ""
    return paired(own.get(source), other.get(source), METRICS[metric].link)


def _changed(arm: RunArm, run: Run) -> tuple[str, str | None]:
    """What really was other, in words, as both jobs recorded it; and why it is no null arm, where nothing was."""
    own, other = (_computed(slug, run) for slug in (arm.slug, arm.of or ""))
    setting = SETTINGS[str(arm.null)]
    here, there = own.get(setting), other.get(setting)
    if here == there:
        return "", f"{NAMES[str(arm.null)]} was no other: both were computed with {_shown(setting, here)}"
    words = [f"{_shown(setting, here)} instead of {_shown(setting, there, bare=True)}"]
    words += [  # threads are no part of an identity, so that arms of earlier runs may have had others
        f"{_shown(name, own[name])} instead of {_shown(name, other[name], bare=True)}"
        for name in SETTINGS.values()
        if name != setting and name in own and name in other and own[name] != other[name]
    ]
    return ", ".join(words), None


def _shown(setting: str, value: Any, *, bare: bool = False) -> str:
    if bare:
        return str(value)
    if setting == "batch_size":
        return f"batch size {value}"
    return f"{value} attention" if setting == "attention" else f"{value} thread{'' if value == 1 else 's'}"


def _computed(slug: str, run: Run) -> Mapping[str, Any]:
    arm = run.arm(slug)
    step = run.step(arm.evaluate) if arm else None
    return (step.manifest or {}).get("result", {}).get("computed", {}) if step else {}


def _answers_changed(arm: RunArm, run: Run) -> tuple[int, int] | None:
    """Answers to rows of test that are other than those of the arm whose files it has, and how many both have."""
    own, other = (_answers(slug, run) for slug in (arm.slug, arm.of or ""))
    shared = own.keys() & other.keys()
    return (sum(own[row] != other[row] for row in shared), len(shared)) if shared else None


def _answers(slug: str, run: Run) -> dict[str, str]:
    arm = run.arm(slug)
    step = run.step(arm.evaluate) if arm else None
    path = step.files / "answers.parquet" if step and step.files else None
    if path is None or not path.exists():
        return {}
    table = pq.read_table(path, columns=["row", "answer"], filters=[("split", "==", "test")]).to_pydict()
    return dict(zip(table["row"], table["answer"], strict=True))


# ---- what it means for a comparison


def no_more_than_noise(
    comparison: Comparison, noise: Noise, evidence: Mapping[str, ArmEvidence], *, reference: str | None
) -> str | None:
    """The words for a difference that is no larger than the largest null difference; None for a larger one.

    Perplexities are compared by their losses: a difference in perplexity is larger where perplexity is.
    """
    source = METRICS[comparison.metric].source or ""
    largest = noise.largest.get(source)
    a, b = (evidence[slug].scores.get(source) for slug in (comparison.a, comparison.b))
    if source == "kl" and comparison.b == reference and a is not None:
        b = a.zeros()  # its KL to itself
    if largest is None or a is None or b is None:
        return None
    size = abs(a.sums.value - b.sums.value)
    return words(largest.kind) if largest.size > 0 and size <= largest.size else None


def words(kind: str) -> str:
    """`no more than a change of the batch size makes`."""
    return f"no more than a change of {NAMES[kind]} makes"


# ---- the report's section


def section(noise: Noise, below: Sequence[Mapping[str, Any]], compared: int, draws: Draw) -> dict[str, Any]:
    """Key `nulls` of report.json.

    Args:
        noise: The null arms.
        below: Comparisons of report.json that are no more than noise.
        compared: Comparisons in all.
        draws: The resamples of some groups.
    """
    arms = {null.arm.slug: _as_dict(null, draws) for null in noise.arms}
    return {
        "arms": arms,
        "largest": {
            metric: {"size": largest.size, "arm": largest.arm, "kind": largest.kind}
            for metric, largest in noise.largest.items()
        },
        "text": [*_sentences(arms, below, compared), *_cpus(noise.instructions)],
    }


def _as_dict(null: NullArm, draws: Draw) -> dict[str, Any]:
    found = differences(list(null.pairs.values()), draws)
    return {
        "kind": null.arm.null,
        "of": null.arm.of,
        "changed": null.changed or None,
        "reason": null.reason,
        "unmade": null.arm.unavailable is not None,
        "differences": {
            metric: {"difference": difference.estimate, "ci95": list(difference.ci95), "n": pair.a.n}
            for (metric, pair), difference in zip(null.pairs.items(), found, strict=True)
        },
        "answers": None if null.answers is None else {"changed": null.answers[0], "n": null.answers[1]},
    }


def _sentences(
    arms: Mapping[str, Mapping[str, Any]], below: Sequence[Mapping[str, Any]], compared: int
) -> Iterator[str]:
    for slug, arm in arms.items():
        if arm["reason"] is not None:
            yield f"{slug} {'was not made' if arm['unmade'] else 'says nothing'}: {arm['reason']}."
            continue
        parts = [_figure(metric, line) for metric, line in arm["differences"].items() if metric in _told(arm)]
        answers = arm["answers"]
        changed = f"; {answers['changed']:,} of {answers['n']:,} greedy answers changed" if answers else ""
        yield f"{slug}: the files of {arm['of']}, {arm['changed']}: {', '.join(parts)}{changed}."
    if all(arm["reason"] is not None for arm in arms.values()):
        return
    if not below:
        yield f"Each of the {compared:,} differences under Comparisons is larger than this noise of arithmetic."
        return
    pairs = "; ".join(f"{line['a']} / {line['b']} ({METRICS[line['metric']].label})" for line in below)
    yield f"{len(below):,} of {compared:,} differences under Comparisons are no larger than this noise: {pairs}."


def _cpus(instructions: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """That arms were scored on CPUs that multiply otherwise: no obstacle, and no null arm shows it."""
    if instructions:
        named = "; ".join(f"{name}: {', '.join(slugs)}" for name, slugs in instructions.items())
        yield f"Arms were scored on CPUs with different instructions, whose last bits differ, too: {named}."


def _told(arm: Mapping[str, Any]) -> list[str]:
    """Task scores, loss and KL; report.json has the others."""
    return [name for name in arm["differences"] if name in ("task", "ppl_test", "kl_mean") or name.startswith(TASK)]


def _figure(metric: str, line: Mapping[str, Any]) -> str:
    of = "answers" if metric.startswith("task") else "tokens"
    shown = difference_text(metric, line["difference"], line["ci95"])
    return f"{METRICS[metric].label} {shown} ({line['n']:,} {of})"
