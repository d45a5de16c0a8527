"""The chain: versions that were promoted one after the other on test rows in common, and the best of them.

Each candidate may lose up to the margin. Compared with the champion alone, it may do so again every week: ten weeks of
a point each are ten points, with "promoted" on every line. So it is compared with the best version of the chain, too,
and what was lost since then counts against the same margin.

**Which version is the best is read from dev, as everything that chooses here.** On test it would be the luckiest of
many on the very rows that decide next, and a candidate that is as good as all of them would have to be as lucky. The
best is the first version that no later one beats on dev by more than BEYOND standard errors of their paired difference:
so a small decline is not taken for the new best by noise. docs/results/gate.md has what other rules would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flows.gate.looks import HALF
from flows.promotion.champion import row_name, stale, training_of
from flows.promotion.evidence import rows_judged_on, scores_folder, test_rows
from flows.promotion.journal import Promotion
from flows.results.rows import RowScores, read_dev, read_scores
from flows.results.stats import Estimand, Sums, Z, standard_error
from tasks.runtime.store.local import Store

BEYOND = 1.0  # standard errors on dev
FEWEST_GROUPS = 2  # of rows; with fewer in common nothing can be said about the spread
METRICS = ("task", "bits")  # what ranks versions, the first that the candidate has; bits a byte hold for any tokenizer


class Link(NamedTuple):
    """A version of the chain, with its scores as they were when it was promoted."""

    line: Promotion
    dev: RowScores
    test: RowScores


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What the candidate follows.

    Attributes:
        metric: What ranks the versions, a metric of scores.parquet.
        links: Versions, in the order of their promotion.
        left_out: Versions of the chain that nothing can be compared with -> why.
        elsewhere: Promoted versions whose rows of test are not connected to the present ones.
        unread: Lines of promotions.jsonl of another layout.
    """

    metric: str
    links: tuple[Link, ...] = ()
    left_out: Mapping[int, str] = field(default_factory=dict[int, str])
    elsewhere: int = 0
    unread: int = 0

    @property
    def best(self) -> Link | None:
        """The first link that no later one beats."""
        best = None
        for link in self.links:
            if best is None or beats(link.dev, best.dev, higher=self.metric == "task"):
                best = link
        return best

    def without(self, version: int, why: str) -> Chain:
        """The same, one version less."""
        kept = tuple(link for link in self.links if link.line.version != version)
        return replace(self, links=kept, left_out={**self.left_out, version: why})

    def as_dict(self, champion: int | None) -> dict[str, Any]:
        """As promotion.json has it; differences are to the best, on the rows of test that both were judged on."""
        best = self.best
        return {
            "metric": self.metric,
            "best": best.line.version if best else None,
            "champion": champion,
            "versions": [_told(link, best, self.metric) for link in self.links if best],
            "left_out": [{"version": version, "reason": why} for version, why in sorted(self.left_out.items())],
            "elsewhere": self.elsewhere,
            "unread": self.unread,
        }


def chain_of(home: Path, lines: Sequence[Promotion], *, digest: str, files: Path, scoring: str | None) -> Chain:
    """The chain that a candidate would go on with.

    Args:
        home: QUENCH_HOME.
        lines: Every decision about its model name, oldest first.
        digest: Of the candidate: it does not follow itself.
        files: Of its evaluation.
        scoring: Its scorers, as lines of promotions.jsonl have them.
    """
    own, rows = read_scores(files), frozenset(test_rows(files))
    metric = next((name for name in METRICS if name in own), METRICS[-1])
    promoted = {line.version: line for line in lines if line.event == "promoted" and line.digest != digest}
    known = {version: rows_judged_on(home, line) for version, line in promoted.items()}
    left_out = {version: "no record of its rows of test is left" for version, seen in known.items() if seen is None}
    connected = set(_connected({version: seen for version, seen in known.items() if seen}, rows))
    links: list[Link] = []
    gone = _withdrawn(lines)
    for version, line in promoted.items():
        if version not in connected:
            continue
        if version in gone:
            left_out[version] = "it was rolled back"
        elif isinstance(link := _compared(home, line, rows, scoring=scoring, metric=metric), str):
            left_out[version] = link
        else:
            links.append(link)
    return Chain(
        metric=metric, links=tuple(links), left_out=left_out, elsewhere=len(known) - len(connected) - _unknown(known)
    )


def beats(later: RowScores, best: RowScores, *, higher: bool) -> bool:
    """A later version takes the place of the best: it is ahead on the rows that both have."""
    pair = in_common(later, best)
    return pair is not None and ahead(pair[0].sums, pair[1].sums, higher=higher)


def ahead(later: Sums, best: Sums, *, higher: bool) -> bool:
    """Better by more than BEYOND standard errors of the paired difference."""
    difference = later.value - best.value
    return (difference if higher else -difference) > BEYOND * standard_error(Estimand(later, best))


def in_common(a: RowScores, b: RowScores) -> tuple[RowScores, RowScores] | None:
    """Both on the rows and counts that they share, in the groups of the second; None where too few are left."""
    pair = tuple(one.where(np.isin(one.rows, other.rows)) for one, other in ((a, b), (b, a)))
    if len(pair[0].rows) != len(pair[1].rows):  # a name that one of them has twice
        return None
    same = (pair[0].rows == pair[1].rows) & (pair[0].count == pair[1].count)
    same &= np.isfinite(pair[0].total) & np.isfinite(pair[1].total)
    kept = (replace(pair[0], group=pair[1].group).where(same), pair[1].where(same))
    return kept if len(kept[0].groups) >= FEWEST_GROUPS else None


def _connected(tests: Mapping[int, frozenset[str]], rows: frozenset[str]) -> Iterator[int]:
    """Versions whose rows of test share one with the present ones, or with those of another such version."""
    todo, reached = dict(tests), set(rows)
    while near := [version for version, seen in todo.items() if not reached.isdisjoint(seen)]:
        for version in near:
            reached |= todo.pop(version)
            yield version


def _unknown(known: Mapping[int, frozenset[str] | None]) -> int:
    return sum(seen is None for seen in known.values())


def _withdrawn(lines: Sequence[Promotion]) -> set[int]:
    """Versions that a rollback took away: whoever did that has seen something that test does not show."""
    gone: set[int] = set()
    for line in lines:
        if line.event in ("promoted", "rolled back"):
            gone.discard(line.version)
        if line.event == "rolled back" and line.champion is not None:
            gone.add(line.champion)
    return gone


def _unfit(home: Path, line: Promotion, rows: frozenset[str], scoring: str | None) -> str | None:
    """Why a version cannot be scored on the present rows, or its record not be compared."""
    if problem := stale(Store(home), line, digests=False):
        return f"its files are not what was promoted ({problem.why.rstrip('.')})"
    if scoring and line.scoring and line.scoring != scoring:
        return "it was scored by other scorers than this run"
    trained = set(training_of(line, home)["rows"])
    own = sum(row_name(name) in trained for name in rows)
    if own > HALF * len(rows):
        return f"it was trained on {own:,} of these {len(rows):,} rows"
    return None


def _compared(home: Path, line: Promotion, rows: frozenset[str], *, scoring: str | None, metric: str) -> Link | str:
    """The link of a version, or why it is left out."""
    try:
        return _unfit(home, line, rows, scoring) or _link(home, line, metric)
    except (OSError, ValueError, KeyError) as error:  # JSON and parquet that something has cut short or changed
        return f"its record cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:80]})"


def _link(home: Path, line: Promotion, metric: str) -> Link | str:
    folder = scores_folder(home, line)
    if folder is None:
        return "no record of its scores is left"
    dev, test = read_dev(folder).get(metric), read_scores(folder).get(metric)
    if dev is None or test is None or not dev.finite:
        return f"it has no {'task scores' if metric == 'task' else 'loss'} on dev and test"
    return Link(line, dev, test)


def _told(link: Link, best: Link, metric: str) -> dict[str, Any]:
    """A version as the report shows it: its difference to the best, as each was scored when it was judged."""
    told: dict[str, Any] = {name: getattr(link.line, name) for name in ("version", "at", "run", "arm")}
    pair = in_common(link.test, best.test)
    if link is best or pair is None:
        reason = None if link is best else "no row of test in common with the best"
        return {**told, "difference": 0.0 if link is best else None, "ci95": None, "n": 0, "reason": reason}
    estimand = Estimand(pair[0].sums, pair[1].sums)
    at, half = pair[0].sums.value - pair[1].sums.value, Z * standard_error(estimand)
    return {**told, "difference": at, "ci95": [at - half, at + half], "n": len(pair[0].rows), "reason": None}
