"""The chain of versions before the candidate, line by line: what the table and the figure of it show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flows.gate.checks import BEST, Check, difference_of, margin_text
from flows.report.tables import markdown_table
from flows.results.stats import Interval
from recipes.arms import CHAMPION

HEAD = ("version", "promoted", "arm", "difference to the best")
SHOWN = 26  # half a year of weeks: the latest ones, and the best
METRIC = {"task": "task", "bits": "bits_per_byte"}


class ChainLine(NamedTuple):
    """A version, or the candidate.

    Attributes:
        name: `3`, `3 (best)`, `candidate`.
        at: Date of its promotion; empty for the candidate.
        text: The difference in words, or why there is none.
        difference: To the best version, in shares or bits a byte; None where it is not known.
    """

    name: str
    at: str
    arm: str
    text: str
    difference: float | None
    ci95: Interval | None


def chain_lines(gate: Mapping[str, Any] | None) -> list[ChainLine]:
    """Versions in the order of their promotion, then the candidate; nothing where no two are to be compared."""
    chain = gate.get("chain") if gate else None
    if not gate or not chain or not chain["versions"]:
        return []
    lines = [_line(version, chain) for version in chain["versions"]]
    shown = [line for place, line in enumerate(lines) if place >= len(lines) - SHOWN or "best" in line.name]
    return [*shown, *_candidate(gate, chain)]


def left_away(gate: Mapping[str, Any] | None) -> int:
    """Versions that are not shown."""
    chain = gate.get("chain") if gate else None
    shown = sum(bool(line.at) for line in chain_lines(gate))
    return len(chain["versions"]) - shown if chain else 0


def chain_section(gate: Mapping[str, Any]) -> Iterator[str]:
    """In Markdown: the versions before the candidate, and it, as far from the best one."""
    lines = chain_lines(gate)
    if len(lines) > 1:
        yield ""
        yield from markdown_table(HEAD, [[line.name, line.at or "–", line.arm, line.text] for line in lines])
        if more := left_away(gate):
            yield ""
            yield f"{more} earlier versions are not shown."


def check_against_best(gate: Mapping[str, Any]) -> Check | None:
    """The candidate's check on what ranks the chain, against the best version; the champion where that is the best."""
    chain = gate["chain"]
    against = CHAMPION if chain["best"] == chain["champion"] else BEST
    checks = (check for check in gate["tests"] if check["against"] == against)
    return next((Check.of(check) for check in checks if check["metric"] == METRIC[chain["metric"]]), None)


def margin_of(gate: Mapping[str, Any]) -> tuple[float, str] | None:
    """What may be lost since the best, as a difference and in words."""
    check = check_against_best(gate)
    return (-check.margin if check.is_share else check.margin, margin_text(check)) if check else None


def _line(version: Mapping[str, Any], chain: Mapping[str, Any]) -> ChainLine:
    number = version["version"]
    roles = [role for role in ("best", "champion") if chain[role] == number]
    name = f"{number} ({', '.join(roles)})" if roles else str(number)
    ci95 = Interval(*version["ci95"]) if version["ci95"] else None
    unit = "share" if chain["metric"] == "task" else "bits"
    text = version["reason"] or "–"
    if ci95:
        text = difference_of(
            Check(
                metric=METRIC[chain["metric"]],
                against=BEST,
                margin=0.0,
                unit=unit,
                outcome="none",
                difference=version["difference"],
                ci95=ci95,
            )
        )
    return ChainLine(name, str(version["at"])[:10], version["arm"], text, version["difference"], ci95)


def _candidate(gate: Mapping[str, Any], chain: Mapping[str, Any]) -> Iterator[ChainLine]:
    check = check_against_best(gate)
    if check is not None:
        ends = check.ci_level or check.ci95
        yield ChainLine("candidate", "", gate["candidate"], difference_of(check), check.difference, ends)
