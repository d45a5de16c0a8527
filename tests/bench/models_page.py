"""docs/models.md from the results of `make models`: cells, what check said against what happened, open faults."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SEED = 0
SCHEMES = {"gptq": "gptq-w4-g32", "awq": "awq-w4-g32", "rtn": "rtn-w4-g32", "ct": "ct-gptq-w4-g32"}
COLUMNS = {
    "prepare": "prepare",
    "train": "train",
    "merge": "merge",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "rtn": "RTN",
    "ct": "ct-GPTQ",
    "evaluate": "evaluate",
    "export": "export",
}
COMPARED = ("train", *SCHEMES)  # what check can refuse by itself
Result = Mapping[str, Any]


class Cell(NamedTuple):
    """One cell.

    Attributes:
        state: works, refused, FAULT, not reached or not run here.
        figure: What stands behind it.
    """

    state: str
    figure: str = ""

    @property
    def text(self) -> str:
        """As the table shows it."""
        return f"{self.state}{', ' if self.figure else ''}{self.figure}"


# Words in the names of what is no layer to quantize: towers, gates, routers.
NO_LAYERS = ("vision", "visual", "audio", "multi_modal", "shared_expert_gate", ".router")


class Open(NamedTuple):
    """An open fault, or a difference between check and what happened.

    Attributes:
        step: Of which it is.
        what: What is wrong.
        at: File and function, layer or folder.
    """

    step: str
    what: str
    at: str = ""


def cell(result: Result, column: str) -> Cell:
    """What a column says of an architecture."""
    if column == "evaluate":
        return _evaluate(result)
    step = result["steps"].get(column)
    if step is None or step["state"] == "not reached":
        return Cell("not reached", step["because"] if step else "")
    if "not_here" in step:
        return Cell("not run here")
    if step["state"] == "works":
        return Cell("works", _figure(step))
    if step["state"] == "refused":
        if differs(result, column) or column not in COMPARED:
            return Cell("FAULT", "refused" if said(result, column) else "refused late")
        return Cell("refused")
    return Cell("FAULT", step["type"])


def said(result: Result, step: str) -> list[Mapping[str, str]]:
    """Problems that `quench check` has of a step."""
    check = result["steps"].get("check", {})
    return list(check.get("said", {}).get(step, ()))


def _figure(step: Mapping[str, Any]) -> str:
    figures = [f"KL {step['kl']:.1g}"] if "kl" in step else []
    if step.get("of") == "base":
        figures.append("of the base")
    if step.get("left_in_bf16", 0) >= 0.005:
        figures.append(f"{step['left_in_bf16']:.0%} bf16")
    return ", ".join(figures)


def _evaluate(result: Result) -> Cell:
    """Of the merged model and of every scheme that was made: how many were loaded and scored."""
    steps = [result["steps"].get(name, {}) for name in ("merge", *SCHEMES)]
    scored = sum("kl" in step for step in steps)
    failed = sum(step.get("phase") == "evaluate" for step in steps)
    if failed:
        return Cell("FAULT", f"{failed} of {failed + scored} arms")
    return Cell("works", f"{scored} arms") if scored else Cell("not reached")


def open_faults(result: Result) -> list[Open]:
    """What is wrong with an architecture: steps that failed, and where check said something else."""
    found: list[Open] = []
    for name, step in result["steps"].items():
        if step["state"] == "failed":
            kind = "" if step["type"] == "the process ended" else f"{step['type']}: "
            found.append(Open(name, f"{kind}{step['what']}", step.get("where", "")))
        elif step["state"] == "refused" and name not in COMPARED:
            found.append(Open(name, f"refused, and check said nothing: {step['what']}", step.get("where", "")))
    return [*found, *(difference for name in COMPARED if (difference := differs(result, name)))]


def differs(result: Result, name: str) -> Open | None:
    """Where check and what happened are not the same."""
    step, problems = result["steps"].get(name), said(result, name)
    if step is None or step["state"] in ("not reached", "failed") or "not_here" in step:
        return None
    if step["state"] == "refused" and not problems:
        return Open(name, f"check passes it, the job refuses it: {step['what']}", step.get("where", ""))
    if step["state"] == "refused" and any(word in problems[0]["what"] for word in NO_LAYERS):
        return Open(name, f"refused for what is no layer to quantize: {problems[0]['what']}")
    if step["state"] == "works" and problems:
        return Open(name, f"check refuses what works: {problems[0]['what']}")
    return None


def verdict(result: Result) -> str:
    """The column check: as happened, or where not."""
    if result["steps"].get("check", {}).get("state") != "works":
        return "FAULT"
    wrong = [name for name in COMPARED if differs(result, name)]
    return f"FAULT: {', '.join(COLUMNS[name] for name in wrong)}" if wrong else "as happened"


def table(results: Sequence[Result]) -> str:
    """A row an architecture."""
    lines = [
        f"| architecture | class | check | {' | '.join(COLUMNS.values())} |",
        f"| --- | --- | --- |{' --- |' * len(COLUMNS)}",
    ]
    for result in results:
        cells = [cell(result, column).text for column in COLUMNS]
        name = result["steps"].get("base", {}).get("class", "")
        settings = result["steps"].get("check", {}).get("settings", [])
        asked = f" ({', '.join(f'`{one}`' for one in settings)})" if settings else ""
        lines.append(f"| {result['title']} | `{name}` | {verdict(result)}{asked} | {' | '.join(cells)} |")
    return "\n".join(lines)


def faults(results: Sequence[Result]) -> str:
    """A line a fault; the same one of several steps is told once."""
    steps: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for fault in open_faults(result):
            what = re.sub(r"\b(ct-)?(gptq|awq|rtn)-w4-g32\b", "the scheme", fault.what)
            steps.setdefault((result["title"], what, fault.at), []).append(COLUMNS.get(fault.step, fault.step))
    lines = [
        f"* **{title}, {', '.join(names)}**: {_inline(what)}{f' *At:* {_inline(at)}' if at else ''}"
        for (title, what, at), names in steps.items()
    ]
    return "\n".join(lines) or "None."


def refusals(results: Sequence[Result]) -> str:
    """What check refuses and why: a line a reason, with the steps by architecture."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for name in COMPARED:
            if cell(result, name).state == "refused":
                problem = said(result, name)[0]
                reason = f"{_inline(problem['why'])} *Next:* {_inline(problem['next'])}"
                by_reason.setdefault(reason, {}).setdefault(result["title"], []).append(COLUMNS[name])
    lines: list[str] = []
    for reason, steps in by_reason.items():
        who = "; ".join(f"{title}: {', '.join(names)}" for title, names in steps.items())
        lines.append(f"* **{who}.** {reason}")
    return "\n".join(lines) or "None."


def _inline(text: str) -> str:
    """One line that Markdown leaves as it is; folders of the work are cut to their last part."""
    words = [word.rsplit("/", 2)[-1] if word.startswith("/") else word for word in text.split()]
    return " ".join(words).replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_").replace("|", r"\|")


def page(results: Sequence[Result], conditions: Mapping[str, str]) -> str:
    """docs/models.md."""
    states = [cell(result, column).state for result in results for column in COLUMNS]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"""<!-- Written by `make models`. -->
# Models that were tried

A tiny random model of each of {len(results)} architectures (128 features, 2 to 4 decoder layers, every kind of layer of
its type), written by transformers' own `save_pretrained`, through the job bodies of a run: prepare, NF4 QLoRA (four
steps), merge onto the dequantized base, {", ".join(SCHEMES.values())}, evaluation of each, export. What a real model of
that type does to memory and quality is not measured here; whether the code takes its layers, names and files is.

{counted} ({len(results)} x {len(COLUMNS)} cells).

{table(results)}

* **works**: the step ended, and what it made held what is asked of it. *KL* is the mean over the completion tokens of
  dev and test, in nats: of the merged model to base + adapter (at most 2e-4, or ten times what one more rounding of
  the weights to bf16 costs), of a quantized one to the model it was made of (at most twice what plain rounding of the
  same weights to 4 bits costs). *bf16* is the share of the decoder's linear weights that the files still hold so.
* **refused**: `quench check` says so from config and headers, and the job says so too; reasons below.
* **FAULT**: it failed, broke a bound, or was refused late (check had passed it). Each has a line below.
* **not reached**: what it needs was not made. **not run here**: its environment is not installed.
* **check**: `quench check` on the recipe, from headers alone, against what happened. In brackets: what the recipe got
  because check asked for it.
* **export**: the merged folder copied and loaded, also in the base's own class; class and processor files of every
  model that was made are the base's.

A step that fails is done once more, alone in a process of its own, before it counts. Where training or merging failed,
the base itself is quantized and exported.

## Open faults

{faults(results)}

## Refused, with the reason

{refusals(results)}

## How

`make models`, or `python -m tests.bench.models --only NAME` for one. Seed {conditions["seed"]}; {conditions["date"]};
code of {conditions["code"]}; {conditions["machine"]}; {conditions["versions"]}.
"""
