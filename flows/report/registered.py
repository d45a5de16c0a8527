"""What was registered before the run, and beside it what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.gate.checks import Check, difference_of
from flows.plan.registered import read_registered


def registered_of(
    folder: Path, *, gate: Mapping[str, Any], power: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """`registered` of report.json; None of a run that is older than registrations.

    Args:
        folder: The run's.
        gate: `gate` of report.json.
        power: `power` of report.json.
    """
    told = read_registered(folder)
    if told is None:
        return None
    found = _found(gate, power)
    return {**told, "found": found, "text": [*_registered(told), _found_text(told, found)]}


def registered_lines(report: Mapping[str, Any]) -> list[str]:
    """What was registered before the run and what was found; nothing of a run that is older than that."""
    return list((report.get("registered") or {"text": []})["text"])


def _found(gate: Mapping[str, Any], power: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The candidate's task score against the merged model that it was made from; None where that was not compared."""
    arm = gate["candidate"]
    line = next((line for line in power if line["arm"] == arm), None)
    if line is None:
        return None
    compared = [check for check in gate["tests"] if (check["metric"], check["against"]) == ("task", line["against"])]
    check = next(iter(compared), None)
    if check is None or check["difference"] is None:
        return None
    rows = {name: line[name] for name in ("arm", "against", "rows", "groups", "changed")}
    return {
        **rows,
        "difference": check["difference"],
        "ci95": check["ci95"],
        "outcome": check["outcome"],
        "text": difference_of(Check.of(check)),
    }


def _registered(told: Mapping[str, Any]) -> Iterator[str]:
    when = "Registered before anything was spent"
    if told["scored_before"]:
        when = f"Registered when {', '.join(told['scored_before'])} had been scored already"
    if told["kept_from"]:
        when += f", by run {told['kept_from']} of the same recipe and data"
    first, *others = told["text"]
    yield f"{when}: {first[:1].lower()}{first[1:]}"
    yield from others
    yield from (
        f"lm-eval tasks of {metric}: {count:,} documents." for metric, count in sorted(told["documents"].items())
    )


def _found_text(told: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "Found: no candidate was compared with the merged model that it was made from by its task score."
    rows = "" if found["rows"] == told["rows"] else f" (registered were {told['rows']:,})"
    return (
        f"Found: {100 * found['changed']:.2g} % of {found['rows']:,} answers{rows} changed between {found['against']} "
        f"and {found['arm']}, {found['text']}: {found['outcome']}."
    )
