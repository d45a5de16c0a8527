"""Looks: how many candidates of one model name the same rows of test have judged, and what that costs.

At 95 % a candidate that is just too bad passes 2.5 % of the time. Of 52 of them, one for each week, one passes in three
years of four. So the chance is spent like money: 5 % for all candidates that one set of test rows judges, one-sided.

* The first candidate takes half of it, 2.5 %: the 95 % interval. Nothing changes for who decides once.
* The others, up to `gate.looks`, share the other half evenly: 0.049 % each where there are 52, a 99.9 % interval.
  (Bonferroni 1936. Equal shares, since nobody knows in which week the bad one comes.) docs/results/gate.md simulates
  what the intervals make of it.
* After them nothing is left: undecided, until there are new rows of test.

A decision counts where it was made on at least half of the present rows (HALF): another `data.salt` leaves the share
`data.test` of the old test in the new one, 15 % by default, and starts anew; rows that came since do so when they are
the larger part. A candidate that is judged again on exactly the same rows is no new look: it keeps its number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from recipes.checks.power import LEVEL, later_level

ALPHA = 0.025  # one-sided, of the first look: its 95 % interval; all later ones share as much, 5 % together
HALF = 0.5


class Judged(NamedTuple):
    """An earlier decision of the same model name.

    Attributes:
        rows: Rows of test that it was made on; None where no record of them is left.
        number: Which look on its rows it was; None where nobody counted yet.
    """

    version: int
    digest: str
    rows: frozenset[str] | None
    number: int | None


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Where a decision stands among those on the same rows.

    Attributes:
        number: Which candidate on these rows it judges, from 1.
        limit: `gate.looks`.
        versions: The versions that these rows judged before, in order.
        unknown: Earlier decisions that left no record of their rows; they are not counted.
    """

    number: int
    limit: int
    versions: tuple[int, ...] = ()
    unknown: int = 0

    @property
    def spent_out(self) -> bool:
        """Nothing is left for this decision."""
        return self.number > self.limit

    @property
    def alpha(self) -> float:
        """One-sided chance that this decision may take; beyond the limit, what the last one took."""
        return (1 - self.level) / 2

    @property
    def spent(self) -> float:
        """Of all looks on these rows up to this one, 0.05 at most."""
        counted = min(self.number, self.limit)
        return ALPHA + (ALPHA * (counted - 1) / (self.limit - 1) if counted > 1 else 0.0)

    @property
    def level(self) -> float:
        """Of the interval that decides."""
        return LEVEL if self.number == 1 else later_level(self.limit)

    def as_dict(self) -> dict[str, Any]:
        """As promotion.json and report.json have it."""
        figures = {"alpha": self.alpha, "alpha_spent": self.spent, "level": self.level}
        return {**asdict(self), "versions": list(self.versions), **figures, "text": looks_text(self)}

    @classmethod
    def of(cls, line: dict[str, Any]) -> Looks:
        """From promotion.json."""
        named = {name: line[name] for name in ("number", "limit", "unknown")}
        return cls(**named, versions=tuple(line["versions"]))


def looks_of(digest: str, rows: Collection[str], before: Sequence[Judged], *, limit: int) -> Looks:
    """Which look it is to judge an artifact on some rows of test.

    Args:
        digest: Of the candidate.
        rows: Names of the rows of test.
        before: Every decision about the model name so far, oldest first.
        limit: `gate.looks`.
    """
    present = frozenset(rows)
    counted = [line for line in before if line.rows is not None and same_test(line.rows, present)]
    unknown = sum(line.rows is None for line in before)
    again = [line for line in counted if line.digest == digest and line.rows == present]
    if again:
        first = again[0]
        counted = counted[: counted.index(first)]
    versions = tuple(line.version for line in _distinct(counted))
    number = again[0].number if again and again[0].number else len(versions) + 1
    return Looks(number=number, limit=limit, versions=versions, unknown=unknown)


def same_test(earlier: frozenset[str], present: frozenset[str]) -> bool:
    """An earlier decision has seen at least half of the present rows."""
    return bool(present) and len(earlier & present) >= HALF * len(present)


def _distinct(lines: Sequence[Judged]) -> list[Judged]:
    """Without those that judged an artifact again on the same rows."""
    seen: set[tuple[str, frozenset[str] | None]] = set()
    kept: list[Judged] = []
    for line in lines:
        if (line.digest, line.rows) not in seen:
            seen.add((line.digest, line.rows))
            kept.append(line)
    return kept


# ---- in words


def looks_text(looks: Looks) -> str:
    """As `The 7th candidate judged on these rows of test; decided at 99.9 %.`."""
    counted = f"The {ordinal(looks.number)} candidate judged on these rows of test"
    many = "1 earlier decision" if looks.unknown == 1 else f"{looks.unknown} earlier decisions"
    lost = f" Not counted: {many} without a record of their rows." if looks.unknown else ""
    if looks.spent_out:
        most = f"{looks.limit:,} is the most (gate.looks)" if looks.limit > 1 else "they judge one alone (gate.looks)"
        return (
            f"{counted}; {most}: undecided, since one of so many passes by luck. It takes new rows of test: another "
            f"data.salt draws them from all rows, or wait until half of test are rows that came since.{lost}"
        )
    return f"{counted}; decided at {level_text(looks.level)}.{lost}"


def level_text(level: float) -> str:
    """`95 %`, `99.9 %`, `99.98 %`: as many digits as tell it from certain."""
    missing = 100 * (1 - level)
    places = 0
    while abs(round(missing, places) - missing) > 0.1 * missing:
        places += 1
    return f"{100 - round(missing, places):.{places}f}".rstrip("0").rstrip(".") + " %"


def ordinal(number: int) -> str:
    """`1st`, `2nd`, `3rd`, `4th`, `11th`."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"
