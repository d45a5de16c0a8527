"""report.html: one self-contained page. Everything on it stands in report.json; the template only arranges it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from flows.layers import errors_plot, weights_plot, worst
from flows.metrics import METRICS, difference_text, interval_text, significant, value_text
from flows.plots import kl_against_size, task_by_arm
from flows.report_text import SPEEDS, columns, data_line, further_tasks, hardware_line, heading, left_out, ran_on

TEMPLATES = Path(__file__).parent / "templates"
OPEN_UP_TO = 8  # comparisons of a family that is shown unfolded


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("report.html.j2")
    arms = report["arms"]
    return template.render(
        r=report,
        columns=columns(report),
        speeds=SPEEDS,
        further=further_tasks(report),
        metrics=METRICS,
        open_up_to=OPEN_UP_TO,
        heading=lambda name: heading(name, report["directions"]),
        value=value_text,
        interval=interval_text,
        difference=difference_text,
        significant=significant,
        quiet=quiet,
        ran_on=ran_on,
        data_line=data_line(report),
        hardware_line=hardware_line(report["hardware"]),
        kl_plot=Markup(kl_against_size(arms)),
        task_plot=Markup(task_by_arm(arms)),
        errors_plot=Markup(errors_plot(report["layers"])),
        weights_plot=Markup(weights_plot(report["layers"])),
        worst=worst(report["layers"]),
        strips=strips(report),
        domains=domains(report),
        memory=memory(report),
        left_out=left_out(report),
        loading={slug: loading(slug, arm) for slug, arm in arms.items() if arm["status"] == "ok"},
    )


def quiet(sentence: str) -> Markup:
    """A sentence with its intervals set back: figures first, brackets behind."""
    return Markup(re.sub(r"\[[^\]]*\]", r'<span class="ci">\g<0></span>', str(escape(sentence))))


class Strip(NamedTuple):
    """A comparison's interval in a box from -1 to 1, on a signed square-root scale of its family and metric."""

    low: float
    at: float
    high: float


def strips(report: Mapping[str, Any]) -> dict[tuple[str, str, str], Strip]:
    """One strip a comparison, by (a, b, metric)."""
    widest: dict[tuple[str, str], float] = {}
    for one in report["comparisons"]:
        scale = (one["family"], one["metric"])
        widest[scale] = max(widest.get(scale, 0.0), *(abs(end) for end in one["ci95_adjusted"]))

    def at(value: float, most: float) -> float:
        return math.copysign(math.sqrt(abs(value) / most), value) if most else 0.0

    return {
        (one["a"], one["b"], one["metric"]): Strip(
            *(
                at(value, widest[one["family"], one["metric"]])
                for value in (one["ci95_adjusted"][0], one["difference"], one["ci95_adjusted"][1])
            )
        )
        for one in report["comparisons"]
    }


def domains(report: Mapping[str, Any]) -> list[str]:
    """Names of the domains, in order."""
    named = {key.split("@", 1)[1] for cells in report["domains"].values() for key in cells}
    return sorted(named)


class MemoryLine(NamedTuple):
    """The step of a stage that took most, predicted against measured, GiB."""

    stage: str
    step: str
    predicted: float | None
    measured: float | None
    device: str


def memory(report: Mapping[str, Any]) -> list[MemoryLine]:
    """One line a stage and device: its largest measured step."""
    largest: dict[tuple[str, str], MemoryLine] = {}
    for one in report["memory"]:
        stage = one["step"].split("/")[0]
        for device in ("host", "gpu"):
            predicted, measured = one[f"predicted_{device}_gib"], one[f"measured_{device}_gib"]
            if not predicted and measured is None:
                continue
            line = MemoryLine(stage, one["step"], predicted, measured, device)
            before = largest.get((stage, device))
            if before is None or (measured or 0.0) > (before.measured or 0.0):
                largest[stage, device] = line
    return list(largest.values())


def loading(slug: str, arm: Mapping[str, Any]) -> str:
    """Python that loads an arm's artifact; paths are relative to QUENCH_HOME."""
    path = repr(arm["path"]) if arm["path"] else "BASE"
    if arm["external"]:
        path = repr(arm["external"]["source"].partition("@")[0])
    lines: list[str] = []
    if slug == "nf4-adapter":
        lines = [
            "nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',",
            "    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)",
            f"model = AutoModelForCausalLM.from_pretrained({path}, quantization_config=nf4)",
        ]
    else:
        lines = [f"model = AutoModelForCausalLM.from_pretrained({path}, dtype='auto')"]
    if arm["adapter_path"]:
        lines.append(f"model = PeftModel.from_pretrained(model, '{arm['adapter_path']}')")
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained('{arm['adapter_path']}/tokenizer')")
    else:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({path})")
    return "\n".join(lines)
