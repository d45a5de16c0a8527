"""`quench compare BEFORE AFTER [--split dev]`: two runs, arm by arm, on the rows of a split that both scored.

Rows are named by their content, so equal names are equal rows. Rows of both runs are compared in pairs; rows of only
one run are left out and counted. What cannot be compared is listed with the reason. Test is what is published; dev is
for tuning, and what an engine served has no part there, since it is asked the rows of test.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.commands.terminal import Output
from flows.results.cells import ArmEvidence, Draws, gather
from flows.results.comparisons import LeftOut, verdict
from flows.results.dev import dev_scores, undecoded
from flows.results.flips import flips_json, flips_text
from flows.results.metrics import METRICS, TASK, Metric, difference_text, is_task, value_text
from flows.results.paired import OTHER_DEVICE, Paired, differences, few_groups, paired
from flows.results.read import Run, read_run
from flows.results.rows import RowScores
from flows.results.served import served_of
from flows.results.stats import Interval
from flows.results.throughput import OUTPUT, at_most
from flows.run.folder import find_run
from recipes.arms import NOT_DECODED
from recipes.problem import Problem
from recipes.scorers import input_name
from tasks.runtime.store.local import find_home

Split = Literal["test", "dev"]
COMPARED = ("task", "ppl_test", "ppl_all", "bits_per_byte", "kl_mean", "ppl_general")
ON_DEV = {"ppl_test": "ppl_dev"}  # names of metrics that say which split they are of
ALIKE = {own: name for name, own in ON_DEV.items()}
FAMILY = "runs"
TUNING = "Dev is for tuning: nothing here decides a promotion."
WIDE, INTERVAL_CHARS = 105, 24  # columns of a terminal with room for all; `[−0.000012, +0.000034]` on a line of its own
STYLES = {"better": "green", "worse": "red"}


class Shared(NamedTuple):
    """Rows of one split in two runs, by name."""

    both: int
    only_before: int
    only_after: int


class ServedTwice(NamedTuple):
    """What an engine made of an arm in two runs, in words: verdict, engine, speed; or why it was not served."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """One arm on one metric: difference = after - before; the word is about after.

    Attributes:
        before: On the shared rows, like `after`; perplexities are exponentials of means.
        rows: Shared rows behind it.
        flips: Of a task: answers of these that turned from right to wrong (lost) or from wrong to right (gained).
    """

    arm: str
    metric: str
    before: float
    after: float
    difference: float
    ci95: Interval
    ci95_adjusted: Interval
    family_size: int
    verdict: str
    rows: int
    flips: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "ci95": list(self.ci95), "ci95_adjusted": list(self.ci95_adjusted)}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two runs.

    Attributes:
        split: Whose rows are compared; with test those of the general hold-out are, too.
        rows: Split -> rows in both and in one of them, of the first arm that both have.
        same_files: Arms whose model and adapter are the same bytes in both runs.
        left_out: Comparisons that could not be made; a is after, b before.
        served: Arm -> what an engine made of it before and after, where one of the runs served it.
    """

    before: str
    after: str
    split: Split = "test"
    rows: Mapping[str, Shared]
    changes: Sequence[Change]
    left_out: Sequence[LeftOut]
    same_files: Sequence[str]
    only_before: Sequence[str]
    only_after: Sequence[str]
    served: Mapping[str, ServedTwice] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "before": self.before,
            "after": self.after,
            "split": self.split,
            "rows": {split: shared._asdict() for split, shared in self.rows.items()},
            "comparisons": [change.as_dict() for change in self.changes],
            "left_out": [{"arm": pair.a, "metric": pair.metric, "reason": pair.reason} for pair in self.left_out],
            **{name: list(getattr(self, name)) for name in ("same_files", "only_before", "only_after")},
            **({"served": {slug: twice._asdict() for slug, twice in self.served.items()}} if self.served else {}),
        }


def command(args: argparse.Namespace) -> Output:
    """Compare two runs by id.

    Raises:
        RecipeError: No such runs, or as of compare_runs.
    """
    home = find_home()
    compared = compare_runs(find_run(home, args.before), find_run(home, args.after), home, split=args.split)
    return Output(json=compared.as_dict(), text=lambda console: print_compared(compared, console))


def compare_runs(before: Path, after: Path, home: Path, *, split: Split = "test") -> Compared:
    """Compare two runs' folders on the rows of a split.

    Raises:
        RecipeError: They are one run, share no arm, or nothing of what they share can be compared.
    """
    if before == after:
        raise Problem(
            what="Both are one run.", where=str(before), why="There is nothing to compare.", next="Name another run."
        ).error()
    runs = read_run(before, home), read_run(after, home)
    old, new = (_evidence(run, split) for run in runs)
    shared = [slug for slug in new if slug in old]
    pairs: dict[tuple[str, str], Paired] = {}
    left_out: list[LeftOut] = []
    for slug in shared:
        for metric in _of_interest(old[slug], new[slug]):
            pair = _pair(metric, old[slug], new[slug], runs, split=split)
            name = ON_DEV.get(metric.name, metric.name) if split == "dev" else metric.name
            if isinstance(pair, str):
                left_out.append(LeftOut(a=slug, b=slug, metric=name, family=FAMILY, reason=pair))
            else:
                pairs[slug, name] = pair
    if not pairs:
        why = "; ".join(dict.fromkeys(pair.reason for pair in left_out)) or "They have no arm in common."
        raise Problem(
            what="The two runs cannot be compared.",
            where=f"{before.name}, {after.name}",
            why=why,
            next="Name other runs.",
        ).error()
    return Compared(
        before=before.name,
        after=after.name,
        split=split,
        rows=_rows(old, new, shared, split),
        changes=_changes(pairs),
        left_out=left_out,
        same_files=[slug for slug in shared if _files(runs[0], slug) == _files(runs[1], slug)],
        only_before=[slug for slug in old if slug not in new],
        only_after=[slug for slug in new if slug not in old],
        served=_served(shared, *(served_of(run, arms, Draws()) for run, arms in zip(runs, (old, new), strict=True)))
        if split == "test"
        else {},
    )


def _evidence(run: Run, split: Split) -> dict[str, ArmEvidence]:
    """Every arm with its scores of a split."""
    evidence = gather(run)
    if split == "test":
        return evidence
    return {
        slug: replace(arm, scores=dev_scores(arm, run), kl=None, absent={**arm.absent, **undecoded(arm)})
        for slug, arm in evidence.items()
    }


def _served(
    shared: Sequence[str], before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> dict[str, ServedTwice]:
    """Arms of both runs that one of them served."""
    served = {slug for section in (before, after) if section for slug in section["arms"]}
    return {slug: ServedTwice(_as_served(slug, before), _as_served(slug, after)) for slug in shared if slug in served}


def _as_served(slug: str, section: Mapping[str, Any] | None) -> str:
    arm = section["arms"].get(slug) if section else None
    if arm is None:
        return f"not served: {section['not_served'].get(slug, 'no step') if section else 'the run served nothing'}"
    load = at_most(arm["loads"])
    rate = f", {value_text(OUTPUT, load[OUTPUT]['value'])} tok/s at {load['requests']} requests" if load else ""
    return f"{arm['verdict']} ({arm['engine']} {arm['version']} on {arm['device']}{rate})"


def _of_interest(old: ArmEvidence, new: ArmEvidence) -> Iterator[Metric]:
    """Metrics that one of the two has, or of whose answers both say that they were not decoded.

    The reference's KL to itself is zero in both runs.
    """
    told = {name for name in old.absent if old.absent[name] == new.absent.get(name) == NOT_DECODED}
    further = sorted({name for name in (*old.scores, *new.scores, *told) if name.startswith(TASK)})
    for metric in (METRICS[name] for name in (*COMPARED, *further)):
        if metric.source == "kl" and old.is_reference and new.is_reference:
            continue
        if metric.source in (*old.scores, *new.scores, *told):
            yield metric


def _pair(
    metric: Metric, old: ArmEvidence, new: ArmEvidence, runs: tuple[Run, Run], *, split: Split = "test"
) -> Paired | str:
    """Both arms' scores on shared rows, or why they cannot be compared."""
    before, after = (arm.scores.get(metric.source or "") for arm in (old, new))
    if before is None or after is None:
        return _missing(metric.source or "", old, new)
    if reason := _unlike(metric, *runs, arm=new.arm.evaluate):
        return reason
    if (metric.source or "").startswith("task") and _ends_counted_once(old, new):
        return "answers without an end score 0 in one of the runs; an older version took them as finished in the other"
    both = np.intersect1d(before.rows, after.rows)
    a, b = (rows.where(np.isin(rows.rows, both)) for rows in (after, before))
    if len(both) == 0:
        return f"the two {split} sets share no row"
    if len(a.rows) != len(both) or len(b.rows) != len(both):
        return f"rows that stand in a {split} set twice"
    if not np.array_equal(a.count, b.count):
        return "the shared rows have other tokens: another tokenizer, template or max_length"
    if not np.array_equal(a.group, b.group):
        return "the shared rows are grouped otherwise"
    pair = paired(a, b, metric.link)
    if isinstance(pair, Paired):
        return pair
    if pair == "other device":
        return f"{OTHER_DEVICE}: {before.device} before, {after.device} after"
    return "scores that are not finite" if pair == "not finite" else f"of the shared rows {few_groups(a)}"


def _missing(source: str, old: ArmEvidence, new: ArmEvidence) -> str:
    """Why one of the two, or both, have no such scores."""
    lacking = {"before": old, "after": new}
    lacking = {when: arm for when, arm in lacking.items() if source not in arm.scores}
    undecoded = [when for when, arm in lacking.items() if arm.absent.get(source) == NOT_DECODED]
    if not undecoded:
        return f"no such scores {next(iter(lacking))}"
    what, _, why = NOT_DECODED.partition(":")
    return NOT_DECODED if len(undecoded) > 1 else f"{what} {undecoded[0]}:{why}"


def _ends_counted_once(old: ArmEvidence, new: ArmEvidence) -> bool:
    """One of the two counted answers without an end, and there were some."""
    counted = [arm.scores.get("truncated") for arm in (old, new)]
    return None in counted and any(rows is not None and rows.total.any() for rows in counted)


def _unlike(metric: Metric, before: Run, after: Run, *, arm: str | None) -> str | None:
    """Why a metric means something else in the two runs; arm: key of the step that scored it."""
    if metric.source == "kl" and _digest(before, "reference") != _digest(after, "reference"):
        return "each run's KL is to its own reference, and they are not the same"
    scorer = metric.source or ""
    if scorer.split(".")[0] == "task" and _scoring(before, scorer, arm) != _scoring(after, scorer, arm):
        return "the two recipes score answers otherwise (evaluate)"
    return None


def _scoring(run: Run, metric: str, arm: str | None) -> list[Any]:
    """What decides whether an answer is right: one scorer, what it reads, and how long an answer may be."""
    settings: Mapping[str, Any] = run.recipe.get("evaluate") or {}
    scorers: list[dict[str, Any]] = settings.get("scorers") or []
    name = metric.removeprefix(TASK)  # of the first one, `task`: it is found by its place
    at = next((n for n, scorer in enumerate(scorers) if n and (scorer.get("name") or scorer["kind"]) == name), 0)
    step = run.step(arm)
    reads = (step.manifest or {}).get("inputs", {}).get(input_name(at), {}).get("digest") if step else None
    return [scorers[at : at + 1], reads, settings.get("max_new_tokens")]


def _digest(run: Run, stage: str) -> str | None:
    manifests = (step.manifest for step in run.steps.values() if step.stage == stage and step.manifest)
    return next((manifest["digest"] for manifest in manifests), None)


def _files(run: Run, slug: str) -> list[Any]:
    """Digests of what an arm loads; never equal to another run's where something is missing."""
    arm = next(arm for arm in run.arms if arm.slug == slug)
    steps = [run.step(key) for key in (arm.model, arm.adapter) if key]
    base = (run.raw.get("base") or {}).get("digest")
    elsewhere = (run.raw.get("external") or {}).get(slug, {}).get("digest")
    return [elsewhere or base, *(step.manifest["digest"] if step and step.manifest else object() for step in steps)]


def _rows(
    old: Mapping[str, ArmEvidence], new: Mapping[str, ArmEvidence], shared: Sequence[str], compared: Split
) -> dict[str, Shared]:
    rows: dict[str, Shared] = {}
    for split, source in ((compared, "nll"), ("general", "nll_general")):
        for slug in shared:
            before, after = (arms[slug].scores.get(source) for arms in (old, new))
            if before is not None and after is not None:
                a, b = set(before.rows.tolist()), set(after.rows.tolist())
                rows[split] = Shared(len(a & b), len(a - b), len(b - a))
                break
    return rows


def _changes(pairs: Mapping[tuple[str, str], Paired]) -> list[Change]:
    """All of them as one family: their adjusted intervals hold together."""
    found = differences(list(pairs.values()), Draws())
    return [
        Change(
            arm=arm,
            metric=metric,
            before=_shown(pair, pair.b),
            after=_shown(pair, pair.a),
            difference=difference.estimate,
            ci95=difference.ci95,
            ci95_adjusted=difference.ci95_adjusted,
            family_size=len(pairs),
            verdict=verdict(ALIKE.get(metric, metric), difference.ci95_adjusted),
            rows=len(pair.a.rows),
            flips=flips_json(pair) if is_task(metric) else None,
        )
        for ((arm, metric), pair), difference in zip(pairs.items(), found, strict=True)
    ]


def _shown(pair: Paired, rows: RowScores) -> float:
    value = rows.sums.value
    return float(np.exp(value)) if pair.link == "exp" else value


def _label(metric: str) -> str:
    return METRICS[ALIKE.get(metric, metric)].label


def print_compared(compared: Compared, console: Console) -> None:
    """Print one table, one line per arm and metric, and below it what was left out."""
    console.print(Text(f"before {compared.before}\nafter  {compared.after}"))
    for split, rows in compared.rows.items():
        both = f"{split}: {rows.both:,} rows in both are compared; {rows.only_before:,} only before and "
        console.print(Text(f"{both}{rows.only_after:,} only after are left out"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("arm", "metric"):
        table.add_column(name, no_wrap=True)
    values = ("before", "after") if console.width >= WIDE else ()
    for name in values:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("after - before", justify="right", min_width=INTERVAL_CHARS)
    table.add_column("after is", no_wrap=True)
    last = ""
    for change in compared.changes:
        ci95 = list(change.ci95_adjusted)
        shown = [value_text(change.metric, getattr(change, name), ci95) for name in values]
        word = Text("no diff. shown" if change.verdict == "no difference shown" else change.verdict)
        word.stylize(STYLES.get(change.verdict, "dim"))
        difference = difference_text(change.metric, change.difference, ci95)
        name = change.arm if change.arm != last else ""
        table.add_row(name, _label(change.metric), *shown, difference, word)
        last = change.arm
    console.print(table)
    if not values:
        console.print(Text("no room for before, after: a wider terminal or --json has them", style="dim"))
    console.print(Text(f"Intervals hold together over all {len(compared.changes)} comparisons.", style="dim"))
    if compared.split == "dev":
        console.print(Text(TUNING, style="dim"))
    for line in _remarks(compared):
        console.print(Text(line, style="dim"))


def _remarks(compared: Compared) -> Iterator[str]:
    counted = ((change, flips_text(change.flips)) for change in compared.changes)
    if lines := [f"{change.arm} ({METRICS[change.metric].label}): {text}" for change, text in counted if text]:
        yield f"Flipped answers: {'; '.join(lines)}."
        yield "p is McNemar's exact test, two-sided, and takes every row for itself; the interval is what decides."
    reasons: dict[str, list[str]] = {}
    for pair in compared.left_out:
        reasons.setdefault(pair.reason, []).append(f"{pair.a} ({_label(pair.metric)})")
    for reason, which in reasons.items():
        yield f"Not compared, {reason}: {', '.join(which)}."
    for heading, which in (
        ("The same files in both runs", compared.same_files),
        ("Only before", compared.only_before),
        ("Only after", compared.only_after),
    ):
        if which:
            yield f"{heading}: {', '.join(which)}."
    for slug, twice in compared.served.items():
        yield f"Served: {slug}: before {twice.before}; after {twice.after}."
