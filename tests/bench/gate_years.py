"""`python -m tests.bench.gate_years`: docs/results/gate.md, years of weekly retrains by gate_simulated.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence

import numpy as np

from flows.results.draws import RESAMPLES, SEED
from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT
from tests.bench.gate_simulated import (
    FEWER,
    LIMIT,
    MARGIN,
    SHARE,
    WEEKS,
    YEARS,
    Rule,
    at_the_edge,
    called_worse,
    decline,
    equal,
    improved,
)


def percent(share: float) -> str:
    """`4.3 %`."""
    return f"{100 * share:.1f} %"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' ---: |' * len(head)}"
    yield from (f"| {' | '.join(line)} |" for line in lines)


HEAD = """# The gate over a year

<!-- Written by `make gate-years`; edit tests/bench/gate_years.py instead. -->

{years:,} simulated years (fewer where a section says so) of {weeks} retrains each, one candidate a week on the same
rows of test. Margin {margin:g} points, `gate.looks: {limit}`, seed {seed}. What decides is the gate's own code: the
level of each look, which version is the best, margins and outcomes; the bootstrap's intervals are those of the same
{resamples:,} resamples. numpy {numpy}.

Nothing here was measured on a real model. A model gets {share:g} % of the rows right; two equal models differ on a
stated share of the rows, the flip rate. 5 % is what `quench check` assumes; 2 % stands for models that are nearly the
same, 10 % and more for a training with other rows or another seed. They are assumptions: no year of retrains was there
to measure.
"""


def page(years: int) -> Iterator[str]:
    """docs/results/gate.md, line by line."""
    versions = locked_versions()
    facts = {"years": years, "weeks": WEEKS, "margin": 100 * MARGIN, "limit": LIMIT, "seed": SEED, "share": 100 * SHARE}
    yield HEAD.format(**facts, resamples=RESAMPLES, numpy=versions.get("numpy", np.__version__))
    yield from _edge(years)
    yield from _decline(years // FEWER)
    yield from _equal(years // FEWER)
    yield from _improved(years)


def _edge(years: int) -> Iterator[str]:
    yield "## Candidates at the margin's edge\n"
    yield (
        f"Each candidate is truly {100 * MARGIN:g} points worse than what it is compared with, and has one check to\n"
        "get through. Share of years in which at least one of 52 is promoted (goal: at most 5 %):\n"
    )
    lines: list[tuple[str, ...]] = []
    for rows, flips in ((700, 0.02), (700, 0.05), (700, 0.10), (2000, 0.05)):
        rules = ((False, False), (True, False), (True, True))
        found = [at_the_edge(years, rows, flips, spend=spend, score=score) for spend, score in rules]
        lines.append((f"{rows:,}", percent(flips), *map(percent, found)))
    yield from table(("rows", "flip rate", "every week at 95 %", "looks, bootstrap alone", "the gate"), lines)
    yield ""
    yield "The bootstrap's standard error is estimated from the few rows that changed. A candidate that loses few of"
    yield "them by luck gets a short interval, most of all where nearly every changed answer is a lost one (2 points at"
    yield "a flip rate of 2 %). So it does not hold its level, least of all 99.9 %. The gate takes Tango's score"
    yield "interval beside it, whose standard error is that at the margin."


def _decline(years: int) -> Iterator[str]:
    yield "\n## A decline\n"
    yield (
        "Each week's candidate is truly a step worse than the one before. Blocked: one of the first three weeks'\n"
        "candidates was (goal: always). Lost: how much worse than the first champion the version is that ships after\n"
        f"52 weeks, in points, mean and most. `champion at 95 %`: the rule without looks and chain. {years:,} years.\n"
    )
    lines: list[tuple[str, ...]] = []
    rules: tuple[Rule, ...] = ("champion at 95 %", "champion", "best on test", "best on dev")
    for rows, flips, step in ((700, 0.05, 0.01), (5000, 0.05, 0.01), (5000, 0.02, 0.01), (5000, 0.02, 0.0025)):
        for rule in rules:
            found = decline(years, rows, flips, rule, step=step)
            blocked = percent(found.within) if step == 0.01 else "–"
            what = ("1 point" if step == 0.01 else f"{100 * step:g} points", f"{rows:,}", percent(flips), rule)
            lines.append((*what, blocked, f"{found.lost:.2f}", f"{found.most:.2f}"))
    yield from table(("a week", "rows", "flip rate", "compared with", "blocked", "lost", "most"), lines)


def _equal(years: int) -> Iterator[str]:
    yield "\n## Equal models\n"
    yield (
        f"{years:,} years. Every candidate is truly as good as the champion. Worse: years in which one is called\n"
        "worse (goal: at most 5 %). Then how many are promoted. `best on test` would take the version with the "
        "highest\n"
        "score on test for the best: the luckiest one, which its equals do not reach. So the gate takes the best on\n"
        "dev.\n"
    )
    lines: list[tuple[str, ...]] = []
    for rows, flips in ((700, 0.02), (700, 0.05), (2000, 0.02), (2000, 0.05), (5000, 0.05), (5000, 0.10)):
        for rule in ("champion", "best on test", "best on dev"):
            found = equal(years, rows, flips, rule)
            shares = (percent(found.worse), percent(found.first), percent(found.later), f"{found.a_year:.1f}")
            lines.append((f"{rows:,}", percent(flips), rule, *shares))
    yield from table(("rows", "flip rate", "compared with", "worse", "promoted, first", "later", "a year"), lines)
    yield ""
    yield "The price of looking often is in the other columns: with 700 rows a later candidate that is only as good as"
    yield "the champion is hardly ever promoted. Rows are what helps."
    yield "\nWhere a candidate has to be better than its equal (margin 0, as against the base), years with a `worse`,"
    yield f"of {FEWER * years:,}:\n"
    yield from table(
        ("rows", "flip rate", "every week at 95 %", "the gate"),
        [
            (
                f"{rows:,}",
                percent(flips),
                *(percent(called_worse(FEWER * years, rows, flips, spend=s)) for s in (False, True)),
            )
            for rows, flips in ((700, 0.05), (2000, 0.05))
        ],
    )


def _improved(years: int) -> Iterator[str]:
    yield "\n## An improvement\n"
    yield "The candidate is truly 3 points better than the champion, on 700 rows. Promoted (goal: at least 80 %):\n"
    yield from table(
        ("flip rate", "as the first look", "as a later look"),
        [(percent(f), *map(percent, improved(years, 700, f))) for f in (0.05, 0.08, 0.10, 0.12, 0.15)],
    )

    yield ""
    yield "As few as 700 rows show it where up to a tenth of the answers change; where more do, later candidates need"
    yield "more rows. The candidate is compared with the champion alone here; the checks against the merged model and"
    yield "the best version can only lower these shares."


def main() -> None:
    """Simulate and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--years", type=int, default=YEARS)
    args = parser.parse_args()
    start = time.monotonic()
    text = "\n".join(page(args.years)) + "\n"
    (CHECKOUT / "docs" / "results" / "gate.md").write_text(text, encoding="utf-8")
    print(text, f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
