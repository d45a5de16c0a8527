"""What the named engine does not read: listed, warned of, marked in the report; and what this machine can make."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.commands.schemes import listed_schemes, missing, text
from flows.report.build import print_report, render
from recipes.schemes.engines import loaders
from recipes.schemes.slugs import known_schemes, parse_scheme
from tests.conftest import QUICKSTART
from tests.flows.synthetic_run import SyntheticRun
from tests.flows.test_cli import quench

WHY = "vLLM does not read the 3-bit weights of gptq-w3-g128."


def test_a_refused_arm_is_marked_everywhere_and_still_ranked(tmp_path: Path):
    run = SyntheticRun(tmp_path, test=60, general=20, refused={"gptq-w3-g128": WHY})
    report = render(run.write(), tmp_path)
    arms = report.json["arms"]
    assert [slug for slug, arm in arms.items() if arm["refused"]] == ["gptq-w3-g128"]
    assert arms["gptq-w3-g128"]["refused"] == WHY and arms["gptq-w3-g128"]["ranked"]
    assert "| gptq-w3-g128 (not served)" in report.markdown and f"Not served: gptq-w3-g128: {WHY}" in report.markdown
    assert "gptq-w3-g128 (not served)" in [row["arm"] for row in report.table]
    page = (report.folder / "report.html").read_text()
    assert WHY in page and page.count('<span class="tag">not served</span>') == 1
    console = Console(file=StringIO(), width=160)
    print_report(report.json, console)
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "gptq-w3-g128 (not served)" in said and WHY in said


def test_runs_of_before_have_no_mark(tmp_path: Path):
    folder = SyntheticRun(tmp_path, test=60, general=20).write()
    raw = json.loads((folder / "steps.json").read_text())
    for arm in raw["arms"]:
        del arm["refused"], arm["calibration"], arm["scales_from_base"]
    (folder / "steps.json").write_text(json.dumps(raw))
    assert "not served" not in render(folder, tmp_path).markdown


def test_check_warns_and_passes(tmp_path: Path):
    words = ("check", str(QUICKSTART / "recipe.yaml"), "--set", "serve.engine=vllm")
    said = quench(*words, home=tmp_path / "home", check=0).stdout
    assert "no problem found" in said and said.count("warning: ") == 2
    told = json.loads(quench(*words, "--json", home=tmp_path / "home", check=0).stdout)
    assert told["ok"] and told["problems"] == []
    assert [one["next"] for one in told["warnings"]] == ["Write ct-gptq-w3-g128: vLLM reads it."] * 2


def test_the_list_says_who_reads_and_what_can_be_made_here(tmp_path: Path):
    rows = {one["slug"]: one for one in json.loads(quench("schemes", "--json", home=tmp_path / "h", check=0).stdout)}
    assert list(rows) == [scheme.slug for scheme in known_schemes()]
    assert set(rows["awq-w4-g128"]["loaders"]) == set(loaders(parse_scheme("awq-w4-g128")))
    assert rows["rtn-w4-g128"]["makeable"] and rows["nf4"]["makeable"] and not rows["gptq-w3"]["command"]
    said = quench("schemes", home=tmp_path / "h", check=0).stdout
    assert all(slug in said for slug in rows) and max(map(len, said.splitlines())) <= 120


def test_an_environment_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tasks.runtime.process.environments.INSTALLED", tmp_path)
    monkeypatch.setattr("tasks.runtime.process.environments.CHECKOUT", tmp_path)
    assert missing("llm-compressor") == "make env-llmcompressor" and missing("gptqmodel") == ""
    ct = {one.slug: one for one in listed_schemes()}["ct-gptq-w4-g128"]
    assert not ct.makeable and ct.command == "make env-llmcompressor"
    assert "`backend: autoawq` makes awq schemes, too: make env-autoawq." in text([ct])
