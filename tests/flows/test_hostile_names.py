"""What data and models say, in a report: text, never taken for HTML, a table's bar, the name of a file or a metric."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from flows.report.build import Report, render
from flows.run.folder import find_run
from flows.tracking.tracker import NAME_CHARS, _name
from recipes.problem import RecipeError
from tests.flows.synthetic_run import SyntheticRun, dump

SCRIPT = "<script>alert(1)</script>"
HOSTILE = (
    SCRIPT,
    "../../../etc/cron.d/x",
    "a|b\n| c | d |",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "</title></style></pre>" + SCRIPT,
    "\u202eevil {{ 7 * 7 }} {% raw %}",
)
PROBLEM = {"what": SCRIPT, "where": "layers|3", "why": '<svg onload="alert(1)">', "next": "[x](javascript:alert(1))"}


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


def run(home: Path, *, hostile: bool) -> Report:
    made = SyntheticRun(home, test=160, general=40, broken={"quantize/gptq-w4-g32": PROBLEM} if hostile else {})
    if not hostile:
        made.broken = {"quantize/gptq-w4-g32": {"what": "w", "where": "w", "why": "w", "next": "n"}}
    folder = made.write()
    if hostile:
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
    return render(folder, home)


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
