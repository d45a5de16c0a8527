"""report.html: one self-contained page. Everything on it stands in report.json; the template only arranges it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from flows.gate.checks import Check, difference_of, label, margin_text
from flows.report import dev
from flows.report.chain import chain_lines, left_away, margin_of
from flows.report.inert import on_pages
from flows.report.kept import lead as kept_lead
from flows.report.kept import reasons as kept_reasons
from flows.report.kept import rows as kept_rows
from flows.report.null_arms import not_ranked, null_arms, ways
from flows.report.plots.chain import chain_plot
from flows.report.plots.domains import domains_plot
from flows.report.plots.fronts import against_size
from flows.report.plots.layers import errors_plot, weights_plot
from flows.report.plots.style import LIGHT, as_picture, family_of, look
from flows.report.plots.throughput import throughput_plot
from flows.report.plots.waterfall import waterfall_plot
from flows.report.registered import registered_lines
from flows.report.served import apart_lines, below, engines, equal_text, floor_text, mark_of, ordered, seconds
from flows.report.text import (
    SPEEDS,
    columns,
    data_line,
    further_tasks,
    gate_sentence,
    hardware_line,
    heading,
    left_out,
    ran_on,
    ran_where,
)
from flows.results.flips import flips_note, flips_text
from flows.results.layers import unmeasured, worst
from flows.results.metrics import (
    METRICS,
    SERVED,
    absent_text,
    difference_text,
    interval_text,
    significant,
    size,
    value_text,
)
from flows.results.power import sentence as power_sentence
from flows.results.samples import marked
from flows.results.served import MARKS
from flows.results.throughput import RATES

TEMPLATES = Path(__file__).parent / "templates"
GATE_MARKS = {"pass": "✓", "worse": "▼", "undecided": "?", "none": "–", "not served as measured": "▼"}
OPEN_UP_TO = 8  # comparisons of a family that is shown unfolded


def page(report: Mapping[str, Any], svgs: Mapping[str, str]) -> str:
    """The whole page, with the figures that `figures` made."""
    report = on_pages(report)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    drawn = {name: Markup(svg) for name, svg in svgs.items()}
    in_engine = report.get("served")
    controls = [slug for slug, arm in report["arms"].items() if arm["role"] == "control"]
    return environment.get_template("report.html.j2").render(
        r=report,
        light=LIGHT,
        columns=columns(report),
        speeds=SPEEDS,
        further=further_tasks(report),
        metrics=METRICS,
        open_up_to=OPEN_UP_TO,
        verdict=verdict(report),
        gate=report.get("gate"),
        gate_marks=GATE_MARKS,
        power=power_sentence(report["power"]),
        registered=registered_lines(report),
        fit=report.get("fit"),
        kept=_kept(report.get("kept")),
        controls=controls,
        shipped=[slug for slug in ways(report) if slug not in controls],
        ways=ways(report),
        nulls=report.get("nulls"),
        null_arms=null_arms(report),
        not_ranked=not_ranked(report),
        failed=[one for one in report["failures"] if one["status"] != "skipped"],
        family=family_of,
        hollow=lambda slug: not look(slug).filled,
        heading=lambda name: heading(name, report["directions"]),
        value=value_text,
        absent=absent_text,
        interval=interval_text,
        difference=difference_text,
        flipped=flips_text,
        flips_note=flips_note(report),
        checks=checks(report.get("gate")),
        bytes=byte_text,
        significant=significant,
        quiet=quiet,
        marked=marked,
        score_mark=score_mark,
        ran_on=ran_on,
        served=in_engine,
        served_mark=lambda slug: mark_of(slug, report),
        served_engines=engines(in_engine) if in_engine else "",
        served_by_place=ordered(in_engine) if in_engine else {},
        served_floor=floor_text(in_engine) if in_engine else None,
        served_below=list(below(in_engine)) if in_engine else [],
        served_metrics=SERVED,
        served_marks=MARKS,
        apart=apart_lines,
        equal_text=equal_text,
        rates=RATES,
        seconds=seconds,
        throughput_plot=drawn.get("throughput"),
        dev=dev,
        data_line=data_line(report),
        hardware_line=hardware_line(report["hardware"]),
        where=ran_where(report),
        kl_plot=drawn.get("kl-against-size"),
        task_plot=drawn.get("task-against-size"),
        chain=chain_lines(report.get("gate")),
        chain_more=left_away(report.get("gate")),
        chain_margin=margin_of(report["gate"]) if chain_lines(report.get("gate")) else None,
        chain_plot=drawn.get("chain"),
        waterfall_plot=drawn.get("waterfall"),
        domains_plot=drawn.get("domains"),
        errors_plot=drawn.get("layer-errors"),
        weights_plot=drawn.get("layer-weights"),
        worst=worst(drawn_layers(report)),
        unmeasured=unmeasured(report["layers"]),
        strips=strips(report),
        domains=domains(report),
        memory=memory(report),
        left_out=left_out(report),
    )


def figures(report: Mapping[str, Any]) -> dict[str, str]:
    """Every figure of the page as SVG by its name; those that have nothing to show are left out."""
    report = on_pages(report)
    layers = drawn_layers(report)
    drawn = {
        "kl-against-size": against_size(report["arms"], "kl_mean"),
        "task-against-size": against_size(report["arms"], "task"),
        "chain": chain_plot(report.get("gate")),
        "waterfall": waterfall_plot(report.get("waterfall")),
        "domains": domains_plot(report),
        "layer-errors": errors_plot(layers),
        "layer-weights": weights_plot(layers),
        "throughput": throughput_plot(report.get("served")),
    }
    return {name: svg for name, svg in drawn.items() if svg}


def pictures(svgs: Mapping[str, str]) -> dict[str, str]:
    """The figures as files of their own."""
    return {name: as_picture(svg) for name, svg in svgs.items()}


def drawn_layers(report: Mapping[str, Any]) -> dict[str, Any]:
    """`layers` of the schemes on the merged model; variants of them would cover each other."""
    return {slug: layers for slug, layers in report["layers"].items() if report["arms"][slug]["role"] == "scheme"}


def _kept(kept: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The section of the gain that is kept: its sentence, its rows, and why some have no share."""
    return {"lead": kept_lead(kept), "rows": kept_rows(kept), "reasons": kept_reasons(kept)} if kept else None


def verdict(report: Mapping[str, Any]) -> list[str]:
    """The page's first three sentences: the gate's, where it judged, comes first and the last one gives way."""
    sentence = gate_sentence(report.get("gate"))
    return [sentence, *report["verdict"][:2]] if sentence else list(report["verdict"])


class CheckLine(NamedTuple):
    """A line of the gate's table."""

    check: Check
    name: str
    margin: str
    difference: str
    flips: str


def checks(gate: Mapping[str, Any] | None) -> list[CheckLine]:
    """Every check of the gate, those within a domain last."""
    every = [Check.of(line) for line in (*gate["tests"], *gate["domains"])] if gate else []
    return [
        CheckLine(
            check,
            label(check.metric) + (f" in {check.domain}" if check.domain else ""),
            margin_text(check) if check.margin else "better than it",
            difference_of(check),
            flips_text(check.flips),
        )
        for check in every
    ]


def byte_text(value: float | None) -> str:
    """Bytes, with decimal prefixes from a thousand on; a dash where there are none."""
    if value is None:
        return "–"
    if value < 1e3:
        return f"{value:g} B"
    return size(value) if value >= 1e6 else f"{significant(value / 1e3)} kB"


def score_mark(score: float | None) -> str:
    """Right, wrong, or the score in between."""
    if score is None:
        return "no score:"
    return {1.0: "✓", 0.0: "✗"}.get(score, f"{significant(score, 2)}:")


def quiet(sentence: str) -> Markup:
    """A sentence with its intervals set back: figures first, brackets behind."""
    return Markup(re.sub(r"\[[^\]]*\]", r'<span class="ci">\g<0></span>', str(escape(sentence))))


class Strip(NamedTuple):
    """A comparison's interval in a box from -1 to 1, on a signed square-root scale of its family and metric."""

    low: float
    at: float
    high: float


def strips(report: Mapping[str, Any]) -> dict[tuple[str, str, str], Strip]:
    """One strip per comparison, by (a, b, metric)."""
    widest: dict[tuple[str, str], float] = {}
    for line in report["comparisons"]:
        scale = (line["family"], line["metric"])
        widest[scale] = max(widest.get(scale, 0.0), *(abs(end) for end in line["ci95_adjusted"]))

    def at(value: float, most: float) -> float:
        return math.copysign(math.sqrt(abs(value) / most), value) if most else 0.0

    return {
        (line["a"], line["b"], line["metric"]): Strip(
            *(
                at(value, widest[line["family"], line["metric"]])
                for value in (line["ci95_adjusted"][0], line["difference"], line["ci95_adjusted"][1])
            )
        )
        for line in report["comparisons"]
    }


def domains(report: Mapping[str, Any]) -> list[str]:
    """Names of the domains, in order."""
    names = {key.split("@", 1)[1] for cells in report["domains"].values() for key in cells}
    return sorted(names)


class MemoryLine(NamedTuple):
    """The step of a stage that took most, predicted against measured, GiB."""

    stage: str
    step: str
    predicted: float | None
    measured: float | None
    device: str


def memory(report: Mapping[str, Any]) -> list[MemoryLine]:
    """One line per stage and device: its largest measured step."""
    largest: dict[tuple[str, str], MemoryLine] = {}
    for step in report["memory"]:
        stage = step["step"].split("/")[0]
        for device in ("host", "gpu"):
            predicted, measured = step[f"predicted_{device}_gib"], step[f"measured_{device}_gib"]
            if not predicted and measured is None:
                continue
            line = MemoryLine(stage, step["step"], predicted, measured, device)
            before = largest.get((stage, device))
            if before is None or (measured or 0.0) > (before.measured or 0.0):
                largest[stage, device] = line
    return list(largest.values())
