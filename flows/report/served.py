"""What the report says of the engine: a mark beside each served arm, the table "Served", the sentences below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flows.report.tables import cell_text
from flows.results.metrics import difference_text, significant
from flows.results.served import MARKS, fastest, not_served_text
from flows.results.throughput import OUTPUT, RATES

HEAD = ("arm", "verdict", "served loss", "served − own", "served task %", "answers equal")
SPEED_HEAD = ("arm", "place", "requests", "prefill tok/s ↑", "output tok/s ↑", "first token s ↓", "p95 s ↓")


def mark_of(slug: str, report: Mapping[str, Any]) -> str:
    """`served ✓`, `not served`, or nothing: what stands beside an arm's name."""
    if report["arms"][slug]["refused"]:
        return "not served"
    served = report.get("served") or {"arms": {}}
    if told := served["arms"].get(slug):
        return f"served {MARKS[told['verdict']]}"
    failed = any(slug in one["arms"] and one["step"].startswith("serve/") for one in report["failures"])
    return "not served" if failed else ""


def engines(served: Mapping[str, Any]) -> str:
    """`vllm 0.32.0 on cpu`: all that served an arm."""
    named = {f"{arm['engine']} {arm['version']} on {arm['device']}" for arm in served["arms"].values()}
    return ", ".join(sorted(named))


def rows_of(served: Mapping[str, Any]) -> list[list[str]]:
    """The table of what was served: verdict, loss and its difference, task, answers."""
    return [
        [
            slug,
            f"{MARKS[arm['verdict']]} {arm['verdict']}",
            cell_text("served_loss", arm["metrics"]["served_loss"]),
            apart(arm, "served_loss"),
            cell_text("served_task", arm["metrics"]["served_task"]),
            equal_text(arm),
        ]
        for slug, arm in served["arms"].items()
    ]


def speed_rows(served: Mapping[str, Any]) -> list[list[str]]:
    """The table of speeds, the fastest first: a line for each arm and load."""
    return [
        [
            slug,
            "–" if arm["rank"] is None else str(arm["rank"]),
            str(load["requests"]),
            *(cell_text(name, load[name]) for name in RATES),
            *(seconds(load["ttft_s"][name]) for name in ("median", "p95")),
        ]
        for slug, arm in ordered(served).items()
        for load in arm["loads"]
    ]


def ordered(served: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Served arms that were timed, by their place; those without one last."""
    timed = {slug: arm for slug, arm in served["arms"].items() if arm["loads"]}

    def place(slug: str) -> tuple[float, float]:
        arm = timed[slug]
        return arm["rank"] or len(timed) + 1, -(arm["loads"][-1][OUTPUT]["value"] or 0.0)

    return {slug: timed[slug] for slug in sorted(timed, key=place)}


def apart(arm: Mapping[str, Any], metric: str) -> str:
    """Served - own with its interval; a dash where they could not be compared."""
    told = arm["differences"][metric]
    return "–" if told["difference"] is None else difference_text(metric, told["difference"], told["ci95"])


class Apart(NamedTuple):
    """A difference and its interval, in words, for two lines of a cell; without a unit."""

    estimate: str
    interval: str


def apart_lines(arm: Mapping[str, Any], metric: str) -> Apart:
    """Served - own, the interval apart."""
    estimate, bracket, rest = apart(arm, metric).partition(" [")
    return Apart(estimate, bracket.strip() + rest.partition("]")[0] + "]" if bracket else "")


def equal_text(arm: Mapping[str, Any]) -> str:
    """`706 of 714`."""
    cell = arm["metrics"]["served_answers_equal"]
    return "–" if cell["value"] is None else f"{round(cell['value'] * cell['n']):,} of {cell['n']:,}"


def seconds(value: float | None) -> str:
    """Three digits; a dash where nothing was timed."""
    return "–" if value is None else significant(value, 3)


def floor_text(served: Mapping[str, Any]) -> str | None:
    """What the verdicts stand on; None where nothing was served."""
    if not served["arms"]:
        return None
    floor, limit = served["floor"], served["limits"]["loss"]
    if floor["arm"] is None:
        return f"Judged by the loss alone, which may differ by {limit:g} nats a token: {floor['reason']}."
    return (
        f"Two engines round in another order: {floor['arm']}, where nothing is quantized, shows by how much. An arm "
        f"differs where its loss is off by {limit:g} nats a token more than that, its rows by more than "
        f"{served['limits']['rows_times']:g} times as much, or clearly more of its answers."
    )


def below(served: Mapping[str, Any]) -> Iterator[str]:
    """Lines under the tables: what did not pass, starts and memory, who is fastest, what was not served."""
    for slug, arm in served["arms"].items():
        if told := [check["text"] for check in arm["checks"] if check["outcome"] != "pass"]:
            yield f"{slug}: {'; '.join(told)}."
    started = [f"{slug} {_start(arm)}" for slug, arm in served["arms"].items() if arm["start_s"] is not None]
    if started:
        yield f"Until it answers, and what it holds in memory then: {'; '.join(started)}."
    if told := fastest(served["arms"]):
        yield told
    yield from not_served_text(served)


def _start(arm: Mapping[str, Any]) -> str:
    held = "" if arm["resident_gib"] is None else f", {arm['resident_gib']:.2f} GiB"
    kernel = f", {arm['kernel']}" if arm["kernel"] else ""
    return f"{arm['start_s']:.0f} s{held}{kernel}"


def served_figures(slug: str, report: Mapping[str, Any]) -> dict[str, float]:
    """Name -> number of all that an engine gave for an arm, the ends of intervals as NAME.low and NAME.high.

    Rates and times to the first token end with the number of requests: `served_output_tokens_per_s.32`. Empty where the
    arm was not served.
    """
    arm = (report.get("served") or {"arms": {}})["arms"].get(slug)
    if arm is None:
        return {}
    cells = dict(arm["metrics"])
    figures: dict[str, float | None] = {"served_start_s": arm["start_s"], "served_resident_gib": arm["resident_gib"]}
    for load in arm["loads"]:
        cells |= {f"served_{name}.{load['requests']}": load[name] for name in RATES}
        figures |= {f"served_ttft_s.{name}.{load['requests']}": load["ttft_s"][name] for name in ("median", "p95")}
    for name, cell in cells.items():
        ends = cell["ci95"] or (None, None)
        figures |= {name: cell["value"], f"{name}.low": ends[0], f"{name}.high": ends[1]}
    for name, told in arm["differences"].items():
        figures[f"{name}_minus_own"] = told["difference"]
    return {name: value for name, value in figures.items() if value is not None}
