"""What data and models say, in a report: text, never taken for HTML, a table's bar, the name of a file or a metric."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from flows.commands.terminal import Output, say
from flows.report.build import Report, evaluate, print_report, render
from flows.report.console import TextConsole
from flows.report.html import page
from flows.report.inert import in_lines, inert, on_pages, one_line, visible
from flows.report.model_card import card, provenance_of
from flows.report.plots.domains import domains_plot
from flows.report.text import markdown, overview
from flows.results.read import Run, read_run
from flows.run.folder import find_run
from flows.run.progress import Display
from flows.tracking.values import NAME_CHARS, _name
from recipes.models.headers import read_headers
from recipes.problem import RecipeError
from recipes.schemes.serve_file import describe
from recipes.schemes.slugs import parse_scheme
from tests.flows.synthetic_run import BASE, SyntheticRun, dump

SCRIPT = "<script>alert(1)</script>"
HOSTILE = (
    SCRIPT,
    "../../../etc/cron.d/x",
    "a|b\n| c | d |\n# PLANTED\n[place]: https://evil.example/",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1) [read me](javascript:alert(1)) ![seen](https://evil.example/seen.png)",
    "</title></style></pre>" + SCRIPT,
    "\u202eevil {{ 7 * 7 }} {% raw %} $\\frac{$ [red]stop[/INST] \x1b]0;owned\x07\x1b[2J\x9b31m",
)
PROBLEM = {
    "what": f"{SCRIPT} {HOSTILE[2]}",
    "where": "layers|3",
    "why": '<svg onload="alert(1)">',
    "next": "[x](javascript:alert(1))",
}


class Page(HTMLParser):
    """Every tag with its attributes, and all text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    @property
    def attributes(self) -> set[str]:
        return {name for _, attrs in self.tags for name, _ in attrs}

    def targets(self) -> Iterator[str]:
        """Where links and sources lead."""
        for _, attrs in self.tags:
            yield from (value or "" for name, value in attrs if name in ("href", "xlink:href", "src", "action"))


def hostile_run(home: Path, *, test: int = 160, general: int = 40) -> Path:
    """A written run whose domains, rows, answers, problems and sources say what they should not."""
    made = SyntheticRun(home, test=test, general=general, broken={"quantize/gptq-w4-g32": PROBLEM})
    folder = made.write()
    renamed = dict(zip(sorted(set(made.domains)), HOSTILE, strict=True))
    for path in home.rglob("*.parquet"):
        table = pq.read_table(path).to_pydict()
        if "domain" in table:
            table["domain"] = [renamed.get(one, one) for one in table["domain"]]
        for column in ("prompt", "reference", "answer", "error"):
            if column in table:
                table[column] = [f"{text}{HOSTILE[n % 7]}" for n, text in enumerate(table[column])]
        pq.write_table(pa.table(table), path)
    record: dict[str, Any] = json.loads((folder / "steps.json").read_text())
    record["name"] = "quickstart"
    record["base"]["source"] = f"org/{SCRIPT}"
    record["code"] = [{"field": "f", "source": SCRIPT, "digest": "0" * 64, "allowed_by": '"><script>'}]
    dump(folder / "steps.json", record)
    return folder


def run(home: Path, *, hostile: bool) -> Report:
    if hostile:
        return render(hostile_run(home), home)
    plain = {"what": "w", "where": "w", "why": "w", "next": "n"}
    return render(SyntheticRun(home, test=160, general=40, broken={"quantize/gptq-w4-g32": plain}).write(), home)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Report]:
    """The same run with plain names, and with hostile ones."""
    return tuple(run(tmp_path_factory.mktemp("home"), hostile=one) for one in (False, True))  # pyright: ignore


@pytest.mark.slow  # two reports with all their figures
def test_the_page_has_no_element_that_data_brought(pages: tuple[Report, Report]) -> None:
    plain, hostile = (Page((one.folder / "report.html").read_text(encoding="utf-8")) for one in pages)
    assert hostile.names <= plain.names | {"dt", "dd"} and "script" not in hostile.names
    assert not {name for name in hostile.attributes if name.startswith("on")}
    assert hostile.attributes == plain.attributes
    targets = list(hostile.targets())
    assert targets and not [one for one in targets if not one.startswith(("#", "data:image/"))]
    for text in (SCRIPT, "onerror=alert(1)", "{{ 7 * 7 }}", 'onload="alert(1)"'):
        assert text in hostile.text, "it is shown, as text"
    assert "49" not in re.findall(r"evil (\S+)", hostile.text)


@pytest.mark.slow  # two reports with all their figures
def test_pictures_are_drawings_alone(pages: tuple[Report, Report]) -> None:
    for name, svg in pages[1].pictures.items():
        found = Page(svg)
        assert re.fullmatch(r"[a-z-]+", name) and "svg" in found.names
        assert not found.names & {"script", "foreignobject", "img", "a"}, name
        assert not {one for one in found.attributes if one.startswith("on")}
        assert all(one.startswith("#") for one in found.targets())


@pytest.mark.slow  # two reports with all their figures
def test_markdown_has_no_tag_and_whole_tables(pages: tuple[Report, Report]) -> None:
    text = pages[1].markdown
    assert "&lt;script>" in text and not re.search(r"<[A-Za-z/!?]", text)
    heads = 0
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(bars) == 1, block
        heads += 1
    assert heads >= 4


@pytest.mark.slow  # two reports with all their figures
def test_files_have_their_own_names(pages: tuple[Report, Report]) -> None:
    plain, hostile = (sorted(path.name for path in one.folder.rglob("*")) for one in pages)
    assert plain == hostile and "report.html" in hostile


# ---- the same without figures


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """A small run of hostile names, and its report."""
    home = tmp_path_factory.mktemp("home")
    read = read_run(hostile_run(home, test=42, general=14), home)
    report = evaluate(read)
    for name in HOSTILE:
        assert any(f"@{name}" in key for cells in report["domains"].values() for key in cells)
    report["because"] = list(HOSTILE)  # what a retrain says of the data
    return read, report


def is_plain(text: str) -> bool:
    """No character that a terminal obeys."""
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def obeyed(markdown: str) -> list[str]:
    """What a reader of Markdown would make of it beside text: tags, links, pictures, headings of data."""
    return re.findall(r"<[A-Za-z/!?]|(?<!\\)\]\(|(?<!\\)\]:|(?<!\\)!\[|^\W*# PLANTED", markdown, re.MULTILINE)


def test_markdown_obeys_no_name(hostile: tuple[Run, dict[str, Any]]) -> None:
    text = markdown(hostile[1])
    assert "PLANTED" in text and "alert(1)" in text and "evil.example" in text, "they are said"
    assert obeyed(text) == [] and is_plain(text)
    note = inert("\n".join(overview(in_lines(hostile[1]))))  # as MLflow shows it
    assert "PLANTED" in note and obeyed(note) == [] and is_plain(note)


def test_a_page_without_figures_obeys_no_name(hostile: tuple[Run, dict[str, Any]]) -> None:
    text = page(hostile[1], {})
    read = Page(text)
    assert not read.names & {"script", "img", "iframe"}
    assert not {name for name in read.attributes if name.startswith("on")}
    assert all(place.startswith("#") for place in read.targets())
    assert "onerror=alert(1)" in read.text and "{{ 7 * 7 }}" in read.text and is_plain(text)


def test_a_terminal_obeys_no_name(hostile: tuple[Run, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=None, text=lambda console: print_report(hostile[1], console)).print(as_json=False)
    Output(json=None, text=lambda console: console.print(f"best: {HOSTILE[6]}")).print(as_json=False)
    Output(json=None, text=HOSTILE[6]).print(as_json=False)
    say(HOSTILE[6])
    told = capsys.readouterr()
    assert "alert(1)" in told.out and told.out.count("[red]stop[/INST]") == 2, "it is shown, and no markup"
    assert is_plain(told.err) and "[red]stop[/INST]" in told.err
    assert is_plain(told.out)


def test_a_line_beside_the_bars_is_text() -> None:
    out = io.StringIO()
    display = Display(TextConsole(file=out, force_terminal=True, width=400, color_system=None))
    with display:
        display.started("train/adapter")
        display.event("train/adapter", {"kind": "progress", "done": 1, "total": 2, "note": HOSTILE[6], "unit": "steps"})
        display.line(HOSTILE[6], style="yellow")
    assert "[red]stop[/INST]" in out.getvalue() and "\x1b]0;owned" not in out.getvalue()


def test_a_figure_takes_a_name_for_text(hostile: tuple[Run, dict[str, Any]]) -> None:
    svg = domains_plot(on_pages(hostile[1]))
    assert "frac{" in svg and "PLANTED" in svg
    read = Page(svg)
    assert not read.names & {"script", "foreignobject", "img", "a"}


def test_a_model_card_obeys_no_name(hostile: tuple[Run, dict[str, Any]]) -> None:
    read, report = hostile
    arm = read.arm("merged-dequantized")
    assert arm is not None
    served = describe(read_headers(BASE), name=arm.slug, scheme=parse_scheme("gptq-w4-g128"))
    refused = {**served, "vllm": {"command": None, "refused": [PROBLEM]}}
    origin = provenance_of(read, arm)
    text = card(origin, {**report, "not_ranked": {arm.slug: HOSTILE[3]}}, refused)
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "alert(1)" in body and obeyed(body) == [] and is_plain(text)


def test_what_a_retrain_says_obeys_no_name(tmp_path: Path) -> None:
    from flows.retrain.flow import _markdown

    changes = {"added": dict.fromkeys(HOSTILE, 1), "removed": {}, "edited": {}}
    record = {"outcome": "trained", "told": list(HOSTILE), "reasons": [], "changes": changes}
    text = _markdown(record, tmp_path)
    assert obeyed(text) == [] and is_plain(text)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(HOSTILE)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


def test_every_console_takes_brackets_for_text() -> None:
    """rich raises where a text holds [/INST], and obeys [red]."""
    flows = Path(__file__).parents[2] / "flows"
    made = [
        (path.name, kind)
        for path in flows.rglob("*.py")
        for kind in re.findall(r"(?<!class )\b(\w*Console)\(", path.read_text(encoding="utf-8"))
    ]
    assert made and {kind for _, kind in made} == {"TextConsole"}, made


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_whatever_is_said_nothing_is_obeyed(text: str) -> None:
    assert obeyed(inert(text).replace("PLANTED", "")) == [] and is_plain(inert(text))
    assert len(one_line(text).splitlines()) <= 1
    visible(text).encode()


@given(st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1), st.text(alphabet="./\\ a\0", min_size=1, max_size=12)))
@settings(max_examples=500, deadline=None)
def test_whatever_data_says_mlflow_takes_the_name(text: str) -> None:
    for name in (_name(text), _name(f"domains/{text}"), _name(f"task@{text}.low")):
        _validate_metric_name(name)
        _validate_param_name(name)
        assert 0 < len(name) <= NAME_CHARS


@pytest.mark.parametrize("name", ["../secrets", "*", "../*", "/etc", "..", "", "-"])
def test_a_run_is_found_below_runs_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secrets").mkdir()
    dump(tmp_path / "secrets" / "steps.json", {})
    dump(tmp_path / "steps.json", {})
    (tmp_path / "runs" / "20260101-a").mkdir(parents=True)
    with pytest.raises(RecipeError):
        find_run(tmp_path, name)
