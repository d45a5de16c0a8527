"""The report as text: Markdown that reads well unrendered, and the table that `quench report` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.report.chain import chain_section
from flows.report.dev import dev_section
from flows.report.fit import fit_section, fit_sentences
from flows.report.inert import in_lines, inert
from flows.report.kept import kept_section
from flows.report.null_arms import not_ranked, null_arms, verdict_text, ways
from flows.report.plots.waterfall import signed
from flows.report.registered import registered_lines
from flows.report.served import HEAD as SERVED_HEAD
from flows.report.served import SPEED_HEAD, below, engines, floor_text, mark_of, speed_rows
from flows.report.served import rows_of as served_rows
from flows.report.tables import cell_text, markdown_table
from flows.results.flips import flips_note, flips_text
from flows.results.metrics import METRICS, TASK, absent_text, difference_text, interval_text, significant, value_text
from flows.results.power import sentence as power_sentence

COLUMNS = ("size_bytes", "task", "truncated", "kl_mean", "ppl_test", "top1_agreement", "ppl_general")
OF_ANY_TOKENIZER = ("bits_per_byte",)  # beside these where there are external models
FIRST = ("size_bytes", "task", "kl_mean")  # of these, what a narrow terminal shows
SPEEDS = ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s")
MARKS = {"better": "+", "worse": "−", "no difference shown": "="}


def columns(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Metrics of the table of all arms."""
    return (*COLUMNS, *OF_ANY_TOKENIZER) if any(arm["external"] for arm in report["arms"].values()) else COLUMNS


def heading(metric: str, directions: Mapping[str, str]) -> str:
    """`KL ↓`: label and the better direction."""
    unit = {"top1_agreement": " %", "truncated": " %", "load_s": " s"}.get(metric, "")
    unit = " %" if metric == "task" or metric.startswith(TASK) else unit
    unit = " tok/s" if metric.endswith("per_s") else unit
    return f"{METRICS[metric].label}{unit} {'↓' if directions[metric] == 'lower' else '↑'}"


def arm_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per arm, every figure with its interval."""
    return [
        {
            "arm": name_of(slug, report),
            **{METRICS[name].label: cell_text(name, arm["metrics"][name]) for name in columns(report)},
        }
        for slug, arm in ways(report).items()
    ]


def name_of(slug: str, report: Mapping[str, Any]) -> str:
    """The slug, with what the engine that the recipe names makes of it."""
    mark = mark_of(slug, report)
    return f"{slug} ({mark})" if mark else slug


def data_line(report: Mapping[str, Any]) -> str:
    """What the figures rest on."""
    parts = [
        f"{split}: {size['rows']:,} rows in {size['groups']:,} groups, {size['tokens']:,} tokens"
        for split, size in report["data"].items()
    ]
    return "; ".join(parts) if parts else "no arm was evaluated"


def markdown(report: Mapping[str, Any]) -> str:
    """report.md."""
    report = in_lines(report)
    lines = overview(report)
    for answer in report["answers"]:
        lines += ["", f"## {answer['question']}", "", *(f"- {sentence}" for sentence in answer["text"])]
    lines += ["", "## Can it be promoted?", "", *(f"- {line}" for line in report["gate"]["text"])]
    lines += [f"- {line}" for line in registered_lines(report)]
    lines += chain_section(report["gate"])
    if loss := waterfall_sentence(report["waterfall"]):
        lines += ["", "## Where does the loss go?", "", f"- {loss}"]
    lines += kept_section(report.get("kept"))
    lines += _noise(report)
    lines += ["", *fit_section(report["fit"]), *_comparisons(report), *_served(report), *_speed(report)]
    lines += [*dev_section(report.get("dev")), *_machine(report)]
    return inert("\n".join(lines)) + "\n"


def overview(report: Mapping[str, Any]) -> list[str]:
    """The first screen of report.md, line by line: verdict, failures, and the table of all arms."""
    lines = [f"# Quench: {report['name']}", "", f"Run `{report['id']}`. {data_line(report)}.", ""]
    lines += [*report["verdict"], ""]
    lines += [*(f"Why it ran: {one}" for one in report["because"]), ""] if report["because"] else []
    lines += _failures(report)
    lines += ["## Arms", "", "95 % intervals in brackets; arrows point to better.", ""]
    arms = ways(report)
    lines += _arms_table(report, list(arms))
    lines += _further(report)
    lines += [f"\n{line}" for line in simulated(report)]
    lines += [f"\nNot served: {slug}: {arm['refused']}" for slug, arm in arms.items() if arm["refused"]]
    return [*lines, *(f"\nNot ranked: {slug}: {why}." for slug, why in not_ranked(report).items())]


def _arms_table(report: Mapping[str, Any], slugs: Sequence[str]) -> Iterator[str]:
    head = ["arm", *(heading(name, report["directions"]) for name in columns(report))]
    arms = report["arms"]
    rows = [
        [name_of(slug, report), *(cell_text(name, arms[slug]["metrics"][name]) for name in columns(report))]
        for slug in slugs
    ]
    return markdown_table(head, rows)


def _noise(report: Mapping[str, Any]) -> Iterator[str]:
    """The section of the null arms; nothing where the run has none."""
    if not (nulls := report.get("nulls")):
        return
    yield from ["", "## How much is noise of arithmetic?", "", *(f"- {line}" for line in nulls["text"])]
    if slugs := null_arms(report):
        yield ""
        yield from _arms_table(report, slugs)


def _further(report: Mapping[str, Any]) -> list[str]:
    """The table of the scorers behind the first; none where there is one scorer."""
    tasks = further_tasks(report)
    if not tasks:
        return []
    head = ["arm", *(heading(name, report["directions"]) for name in tasks)]
    rows = [[slug, *(cell_text(name, arm["metrics"][name]) for name in tasks)] for slug, arm in ways(report).items()]
    return ["", *markdown_table(head, rows)]


def further_tasks(report: Mapping[str, Any]) -> list[str]:
    """Metrics of all scorers but the first."""
    return [one["metric"] for one in report["scorers"][1:]]


def simulated(report: Mapping[str, Any]) -> list[str]:
    """One line that names the arms whose KV cache was simulated, and says how; none where there is no such arm."""
    slugs = [slug for slug, arm in report["arms"].items() if arm["kv_cache"]]
    if not slugs:
        return []
    return [
        f"KV cache simulated, storage only: {', '.join(slugs)}. What storage gives back is what attention reads; size "
        "and memory are those of the arm whose files are loaded."
    ]


def _failures(report: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for failure in report["failures"]:
        if failure["status"] != "skipped":
            log = f" Log: `{failure['log']}`." if failure["log"] else ""
            remedy = f" Next: {failure['problem']['next'].rstrip('.')}." if failure["problem"] else ""
            lines.append(f"- **{failure['status']}** {failure['why']}.{remedy}{log}")
    return ["## What failed", "", *lines, ""] if lines else []


def _comparisons(report: Mapping[str, Any]) -> Iterator[str]:
    yield "## Comparisons"
    yield ""
    yield "Difference = a - b with the interval that holds for its whole family; the verdict is about a."
    if told := flips_note(report):
        yield told
    for family in report["families"]:
        rows = [
            [f"{one['a']} / {one['b']}", METRICS[one["metric"]].label, _difference(one), verdict_text(one)]
            for one in report["comparisons"]
            if one["family"] == family["name"]
        ]
        if rows:
            yield ""
            yield f"**{family['question']}** ({family['size']} comparisons)"
            yield ""
            yield from markdown_table(["a / b", "metric", "difference", "verdict"], rows)
    for reason, pairs in left_out(report).items():
        yield f"\nLeft out, {reason}: {', '.join(pairs)}."
    if told := power_sentence(report["power"]):
        yield f"\n{told}"
    yield ""


def left_out(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Reason -> comparisons that could not be made for it."""
    pairs_by_reason: dict[str, list[str]] = {}
    for line in report["comparisons_left_out"]:
        pair = f"{line['a']} / {line['b']} ({METRICS[line['metric']].label})"
        pairs = pairs_by_reason.setdefault(line["reason"], [])
        if pair not in pairs:
            pairs.append(pair)
    return pairs_by_reason


def _difference(comparison: Mapping[str, Any]) -> str:
    text = difference_text(comparison["metric"], comparison["difference"], comparison["ci95_adjusted"])
    flipped = flips_text(comparison.get("flips"))
    return f"{text} ({flipped})" if flipped else text


def _served(report: Mapping[str, Any]) -> Iterator[str]:
    """The section of the engine; nothing where the run has none."""
    served = report.get("served")
    if not served:
        return
    yield from ["## Served", ""]
    if told := floor_text(served):
        yield from [f"{engines(served)}, the rows of test. {told}", ""]
        yield from [*markdown_table(SERVED_HEAD, served_rows(served)), ""]
    if rows := speed_rows(served):
        yield from [f"Ranked by output tokens a second on {hardware_line(report['hardware'])}.", ""]
        yield from [*markdown_table(SPEED_HEAD, rows), ""]
    for line in below(served):
        yield from [line, ""]


def _speed(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["speed"]:
        return
    yield "## Speed"
    yield ""
    first = next(iter(report["speed"].values()))
    yield f"Batch {first['batch']}, context {first['context']} tokens. It ranks nothing."
    yield ""
    rows = [
        [
            slug,
            *(cell_text(name, report["arms"][slug]["metrics"][name]) for name in SPEEDS),
            ran_on(speed),
            speed["label"] or "",
        ]
        for slug, speed in report["speed"].items()
    ]
    head = ["arm", *(heading(name, report["directions"]) for name in SPEEDS), "kernel", "label"]
    yield from markdown_table(head, rows)
    yield ""


def ran_on(speed: Mapping[str, Any]) -> str:
    """`TorchAtenLinear, cpu, 1 thread`."""
    return f"{speed['kernel']}, {speed['device']}, {speed['threads']} thread{'' if speed['threads'] == 1 else 's'}"


def _machine(report: Mapping[str, Any]) -> Iterator[str]:
    yield "## Time, machine, versions"
    yield ""
    yield from markdown_table(
        ["stage", "seconds"], [[stage, f"{spent:.1f}"] for stage, spent in report["seconds"].items()]
    )
    yield ""
    yield (
        f"{hardware_line(report['hardware'])}. "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + "."
    )
    for node, steps in ran_where(report).items():
        yield ""
        yield f"On {node}: {', '.join(steps)}."
    for one in report["code"]:
        yield ""
        yield f"Code that the recipe names was run: `{one['source']}` ({one['field']}), allowed by {one['allowed_by']},"
        yield f"sha256 {one['digest']}."


def ran_where(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Node of a Ray cluster -> the steps that it made; empty where the run was on one machine."""
    steps: dict[str, list[str]] = {}
    for step in report["steps"]:
        if node := step.get("node"):
            steps.setdefault(f"{node['host']} ({node['address']}, node {node['id'][:8]})", []).append(step["key"])
    return steps


def hardware_line(hardware: Mapping[str, Any]) -> str:
    """`AMD EPYC, 2 cores, 23.5 GiB, no GPU`."""
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    cores = f"{hardware['cores']} core{'' if hardware['cores'] == 1 else 's'}"
    return f"{hardware['cpu']}, {cores}, {hardware['memory_gib']:g} GiB, {gpus}"


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the gate's word, the comparison of all arms, as many columns as fit, what failed, and the answers."""
    if told := gate_sentence(report.get("gate")):
        console.print(Text(told, style="bold"))
        console.print()
    _print_arms(report, console)
    for line in _trouble(report):
        console.print(Text(line, style="yellow"))
    console.print()
    told = [(one["question"], one["short"]) for one in report["answers"]]
    for question, sentence in (*told, *_asides(report)):
        console.print(Text(question, style="bold"))
        console.print(Text(sentence))
        console.print()
    for node, steps in ran_where(report).items():
        console.print(Text(f"On {node}: {', '.join(steps)}."))


def _print_arms(report: Mapping[str, Any], console: Console) -> None:
    """The table of arms; columns that find no room, FIRST last of all, are named below it."""
    cells = {
        name: [_rich_cell(name, arm["metrics"][name]) for arm in ways(report).values()] for name in columns(report)
    }
    table = Table(title=f"{report['name']}: {data_line(report)}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("arm", no_wrap=True)
    names = {slug: name_of(slug, report) for slug in ways(report)}
    room = console.width - max(map(len, names.values()), default=0) - 6  # margins of the table and of the first column
    shown: set[str] = set()
    for name in sorted(cells, key=lambda name: name not in FIRST):  # a stable order
        heads = [heading(name, report["directions"])]
        room -= 3 + max(map(len, heads + [line for cell in cells[name] for line in cell.plain.splitlines()]))
        if room < 0:
            break
        shown.add(name)
    columns_shown = [name for name in cells if name in shown]
    for name in columns_shown:
        table.add_column(heading(name, report["directions"]), justify="right", no_wrap=True)
    for row, (slug, arm) in enumerate(ways(report).items()):
        table.add_row(
            Text(names[slug], style="" if arm["ranked"] else "dim"), *(cells[name][row] for name in columns_shown)
        )
    console.print(table)
    if hidden := [METRICS[name].label for name in cells if name not in shown]:
        console.print(Text(f"no room for {', '.join(hidden)}: a wider terminal or report.html has them", style="dim"))


def _trouble(report: Mapping[str, Any]) -> Iterator[str]:
    """What failed with its remedy, what is not served, what is not ranked."""
    for failure in report["failures"]:
        if failure["status"] != "skipped":
            remedy = f". Next: {failure['problem']['next'].rstrip('.')}." if failure["problem"] else ""
            yield f"{failure['status']}: {failure['why']}{remedy}"
    for slug, arm in report["arms"].items():
        if arm["refused"]:
            yield f"not served: {slug}: {arm['refused']}"
    for slug, why in not_ranked(report).items():
        yield f"not ranked: {slug}: {why}"
    for line in (report.get("served") or {"text": []})["text"]:
        if ": served as measured" not in line:
            yield line


def _asides(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What stands beside the answers where the run has it."""
    if told := waterfall_sentence(report.get("waterfall")):
        yield "Where does the loss go?", told
    if (nulls := report.get("nulls")) and nulls["largest"]:
        yield "How much is noise of arithmetic?", " ".join(nulls["text"])
    if told := power_sentence(report["power"]):
        yield "Are there enough test rows?", told
    if told := "; ".join(fit_sentences(report.get("fit"))):
        yield "What fits?", f"{told}."


def _rich_cell(metric: str, cell: Mapping[str, Any]) -> Text:
    if cell["value"] is None:
        return Text(absent_text(cell["reason"]), style="dim")
    text = Text(value_text(metric, cell["value"], cell["ci95"]))
    interval = interval_text(metric, cell["value"], cell["ci95"])
    return text.append(f"\n{interval}", style="dim") if interval else text


def gate_sentence(gate: Mapping[str, Any] | None) -> str | None:
    """The gate's first sentence; where the candidate does not pass, also the check that weighs most against it."""
    if not gate:
        return None
    return " ".join(gate["text"][: 1 if gate["outcome"] in ("pass", "none") else 2])


def waterfall_sentence(waterfall: Mapping[str, Any] | None) -> str | None:
    """The arm that loses least, step by step."""
    whole = [path for path in (waterfall or {}).get("paths", []) if path["steps"] and not path.get("reason")]
    if not waterfall or not whole:
        return None
    path = min(whole, key=lambda one: sum(step["difference"] for step in one["steps"]))
    steps = ", ".join(
        f"{step['step']} {signed(step['difference'], step['ci95_adjusted'])} ({step['verdict']})"
        for step in path["steps"]
    )
    total = sum(step["difference"] for step in path["steps"])
    start = path["steps"][0]["from"]
    return (
        f"{path['arm']} loses least against {start}: {significant(total, 2)} {waterfall['unit']} on "
        f"{waterfall['split']} ({steps})."
    )
