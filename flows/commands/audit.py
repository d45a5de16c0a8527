"""`quench audit TABLE.csv`: which differences between published scores their number of questions can bear.

Packages with known vulnerabilities are another matter: `make audit`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from flows.commands.audit_table import Table, read_table
from flows.commands.terminal import Output
from flows.results.audit import Audited, Recovery, as_dict, audited
from flows.results.metrics import difference_text, interval_text, value_text
from flows.results.stats import LEVEL, Interval
from flows.results.unpaired import Counted, Figure, Verdict, least_shown, together_z

SHARE, MEAN = "task", "mean"  # how flows.results.metrics writes numbers of either kind
OUTCOMES = {
    "shown": "shown whatever the pairing",
    "depends": "shown for some pairings only",
    "cannot": "cannot be shown",
}


def command(args: argparse.Namespace) -> Output:
    """Audit a table of claims.

    Raises:
        RecipeError: As of read_table.
    """
    table = read_table(args.table)
    found = audited(table.claims)
    return Output(json=as_json(found, table), text=lambda console: print_audited(found, table, console))


def as_json(found: Sequence[Audited], table: Table) -> dict[str, Any]:
    """All of it, with the words of the terminal beside the numbers."""
    counts = Counter(one.verdict.outcome for one in found)
    return {
        "level": LEVEL,
        "level_together": 1 - (1 - LEVEL) / len(found),
        "rows": len(found),
        "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES},
        "outcomes_together": dict(Counter(one.together.outcome for one in found)),
        "expected_by_chance": round((1 - LEVEL) * len(found), 6),
        "least_questions": least_shown(),
        "least_questions_together": least_shown(together_z(len(found))),
        "claims": [
            {**as_dict(one), "verdict_text": verdict_text(one.verdict, one), "text": list(sentences(one))}
            for one in found
        ],
        "not_read": table.not_read,
    }


# ---- words


def verdict_text(verdict: Verdict, one: Audited) -> str:
    """The verdict on a difference."""
    what = "questions" if one.claim.sd is None else "rows"
    if verdict.outcome == "cannot":
        return f"cannot be shown with {one.claim.n:,} {what}"
    if verdict.agree is not None:
        return f"shown only if the two agree on at least {verdict.agree:,} of {one.claim.n:,} questions"
    if verdict.correlation is not None:
        return f"shown only if the two correlate by at least {verdict.correlation:.3f} from row to row"
    return OUTCOMES["shown"]


def sentences(one: Audited) -> Iterator[str]:
    """What is to be said of a claim, the verdict first."""
    yield f"{_difference(one)}: {verdict_text(one.verdict, one)}."
    yield from _beside(one)
    if one.rounding is not None:
        yield f"The digits are too few: with more of them it might be {verdict_text(one.rounding, one)}."
    for figure, counts in ((one.claim.score, one.count), (one.claim.base, one.base_count)):
        if figure is not None and counts is not None:
            yield from _not_whole(figure, counts, one.claim.n)
    if one.claim.gain is not None and one.count is not None:
        yield from _not_whole(one.claim.gain, one.count, one.claim.n)
    if one.recovery is not None:
        yield from _recovery(one.recovery, one.claim.n)


def _difference(one: Audited) -> str:
    if one.questions is None:
        return difference_text(MEAN, one.difference, list(one.narrowest)).split(" [")[0]
    points = difference_text(SHARE, one.difference, list(one.widest)).split(" [")[0]
    return f"{points} points, {_count(one.questions)} of {one.claim.n:,} questions"


def _count(questions: int) -> str:
    return f"{questions:+,}".replace("-", "−").removeprefix("+") if questions else "0"


def _beside(one: Audited) -> Iterator[str]:
    """What makes the verdict's number mean something."""
    if one.questions is None:
        return
    least, size = least_shown(), abs(one.questions)
    if one.verdict.outcome == "cannot" and 0 < size < least:
        enough = -(-least * one.claim.n // size)
        yield (
            f"{least} questions are the least that can be shown, all of them won by the same side; a difference of "
            f"this size needs {enough:,} questions or more."
        )
    if one.verdict.agree is not None and one.unrelated is not None:
        yield f"Models that answer independently of each other would agree on about {one.unrelated:,.0f}."
    if one.verdict.agree is not None and one.unrelated is None:
        yield "The two scores are not given, so any number of questions may differ."


def _not_whole(figure: Figure, counts: Counted, n: int) -> Iterator[str]:
    if not counts.whole:
        yield (
            f"{figure.text} of {n:,} is no whole number of questions ({_count(counts.nearest)} is the nearest, and is "
            "used here): an average over tasks, partial credit, or another n."
        )


def _recovery(recovery: Recovery, n: int) -> Iterator[str]:
    """What came back of what was lost."""
    stated = f"{100 * recovery.stated:.1f} %" if recovery.stated is not None else None
    if recovery.reason is not None:
        yield f"Recovery{f' of {stated}' if stated else ''}: {recovery.reason}."
        return
    assert recovery.value is not None and recovery.returned is not None and recovery.lost is not None
    assert recovery.loss is not None and recovery.gain is not None
    came = f"{_count(recovery.returned)} of {_count(recovery.lost)} questions that were lost came back"
    yield f"Recovery{f' of {stated}' if stated else ''}: {came} ({100 * recovery.value:.1f} %)."
    yield f"The loss {_is_shown(recovery.loss, n)}; what came back {_is_shown(recovery.gain, n)}."
    if recovery.loss.outcome == "cannot":
        yield "A share of a loss that is not shown says nothing."


def _is_shown(verdict: Verdict, n: int) -> str:
    if verdict.outcome == "cannot":
        return "cannot be shown"
    if verdict.agree is None:
        return f"is {OUTCOMES['shown']}"
    return f"is shown only if the two agree on at least {verdict.agree:,} of {n:,}"


def summary(found: Sequence[Audited]) -> str:
    """How many rows can bear what, and what chance makes of so many."""
    counts = Counter(one.verdict.outcome for one in found)
    told = ", ".join(f"{counts[outcome]} {words}" for outcome, words in OUTCOMES.items() if counts[outcome])
    if len(found) == 1:
        return f"1 row: {told}."
    chance = f"{(1 - LEVEL) * len(found):.2g}"
    return (
        f"{len(found)} rows: {told}. Were no difference real, some {chance} of {len(found)} would still be called "
        "shown by chance; the last column holds for all rows together (Bonferroni)."
    )


# ---- the terminal


def print_audited(found: Sequence[Audited], table: Table, console: Console) -> None:
    """Print the numbers as a table, and below it each claim in words."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("claim", overflow="fold")
    for name in ("n", "score,\nbase"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("difference,\nnarrowest,\nwidest", justify="right", no_wrap=True)
    if len(found) > 1:
        grid.add_column("for all\nrows", no_wrap=True)
    for one in found:
        grid.add_row(*_cells(one, together=len(found) > 1))
    console.print(grid)
    for one in found:
        told = " ".join(sentences(one))
        console.print(Text.assemble((_name(one), "bold"), f": {told}"))
    console.print()
    console.print(Text(summary(found), style="dim"))
    if table.not_read:
        console.print(Text(f"Not read: {', '.join(table.not_read)}.", style="dim"))


def _name(one: Audited) -> str:
    return f"{one.claim.name} ({one.claim.metric})"


def _cells(one: Audited, *, together: bool) -> Iterator[Text]:
    kind = MEAN if one.questions is None else SHARE
    yield Text.assemble(one.claim.name, ("\n" + one.claim.metric, "dim"))
    yield Text(f"{one.claim.n:,}")
    score, base = (one.claim.score, one.score_ci95), (one.claim.base, one.base_ci95)
    yield Text("\n").join(_with_interval(kind, figure, ci95) for figure, ci95 in (score, base))
    narrow, wide = (difference_text(kind, one.difference, list(ends)) for ends in (one.narrowest, one.widest))
    first, _, rest = narrow.partition(" ")
    intervals = (text[text.index("[") : text.index("]") + 1] for text in (rest, wide))
    yield Text.assemble(first, *((f"\n{interval}", "dim") for interval in intervals))
    if together:
        yield Text(_together(one.together))


def _with_interval(kind: str, figure: Figure | None, ci95: Interval | None) -> Text:
    if figure is None or ci95 is None:
        return Text("–", style="dim")
    value, ends = float(figure.value), list(ci95)
    return Text.assemble(value_text(kind, value, ends), (f" {interval_text(kind, value, ends)}", "dim"))


def _together(verdict: Verdict) -> str:
    if verdict.agree is not None:
        return f"agree ≥\n{verdict.agree:,}"
    if verdict.correlation is not None:
        return f"corr. ≥\n{verdict.correlation:.3f}"
    return "yes" if verdict.outcome == "shown" else "no"
