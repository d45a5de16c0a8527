"""`quench champion` through the real command, on a home with real decisions: what is there and what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from flows.promotion.promote import roll_back
from flows.reach import JOURNAL
from flows.report.build import render
from tests.flows.homes.thin import opened

MODEL, ARM, SCHEME = "small", "merged-dequantized", "rtn-w4-g128"
WRITTEN = Path(__file__).parents[1] / "homes" / "layout-1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two versions promoted, a third one blocked, in this order. The registry is a view: it has its own tests."""
    home = opened(WRITTEN, tmp_path / "home")
    monkeypatch.setenv("QUENCH_HOME", str(home))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return home


def ask(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of `quench champion WORDS`."""
    capsys.readouterr()
    assert cli.main(["champion", *words]) == code
    told = capsys.readouterr()
    return told.out, told.err


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    return json.loads(ask(capsys, *words, "--json", code=code)[0])


def lines(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / JOURNAL).read_text().splitlines()]


def test_what_runs_in_production(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, MODEL)
    written = lines(home)
    assert (told["version"], told["replaced"], told["event"], told["since"]) == (2, 1, "promoted", written[1]["at"])
    assert told["decided"]["run"] == written[1]["run"] and told["decided"]["outcome"] == "pass"
    assert told["decided"]["checks"] == written[1]["checks"] != []
    assert (told["arm"], told["kind"], told["scheme"]) == (ARM, "bf16", None)
    assert told["problem"] is None and told["unread"] == 0
    assert (Path(told["path"]) / "config.json").is_file()
    assert (told["challenger"]["version"], told["challenger"]["outcome"]) == (3, "undecided")
    report = render(home / "runs" / written[1]["run"], home).json
    published = report["arms"][ARM]["metrics"]
    assert {"task", "ppl_test", "bits_per_byte"} == told["figures"].keys()
    assert told["figures"] == {name: published[name] for name in told["figures"]}
    low, high = told["figures"]["ppl_test"]["ci95"]
    assert low < told["figures"]["ppl_test"]["value"] < high
    text, _ = ask(capsys, MODEL)
    assert "version 2 is champion" in text and told["path"] in text and "version 3 was judged undecided" in text
    assert answer(capsys, f"{MODEL}@champion") == told


def test_a_run_that_is_gone_takes_no_figure_with_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = answer(capsys, MODEL)
    shutil.rmtree(home / "runs")
    shutil.rmtree(home / "store" / "evaluate")
    assert answer(capsys, MODEL) == before
    shutil.rmtree(home / "promotions")
    told = answer(capsys, MODEL)
    assert told["figures"] == {} and told["no_figures"] == "no record of its scores is left"


def test_a_way_back_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roll_back(home, MODEL, 1, say=lambda _: None)
    told = answer(capsys, MODEL)
    assert (told["version"], told["event"], told["replaced"], told["withdrawn"]) == (1, "rolled back", 2, [2])
    assert told["scheme"] == told["arm"] == SCHEME
    assert told["since"] == lines(home)[3]["at"] and told["decided"]["at"] == lines(home)[0]["at"]
    assert "taken away: version 2" in ask(capsys, MODEL)[0]


def test_files_that_are_gone_are_exit_code_1_with_the_record(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = home / lines(home)[1]["path"]
    (artifact / "manifest.json").write_text('{"digest": "')
    told = answer(capsys, MODEL, code=1)
    assert told["version"] == 2 and told["problem"]["why"] == "Its manifest.json cannot be read."
    shutil.rmtree(artifact)
    out, err = ask(capsys, MODEL, code=1)
    assert "version 2 is champion" in out and "It was removed." in err and "quench promote --to" in err
    assert ask(capsys)[0].count("not what was promoted") == 1


def test_where_there_is_none_stdout_is_empty(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = ask(capsys, "other", "--json", code=1)
    assert out == "" and "other has no champion" in err and f"quench champion {MODEL}" in err
    (home / JOURNAL).write_text(json.dumps(lines(home)[2]) + "\n")  # only what was blocked
    for words in ((MODEL,), ()):
        out, err = ask(capsys, *words, "--json", code=1)
        assert (out == "" and "has no champion" in err) or "No model has a champion" in err
    assert "version 3, undecided" in ask(capsys, MODEL, code=1)[1]
    (home / JOURNAL).unlink()
    assert "Nothing was promoted" in ask(capsys, MODEL, code=1)[1]


def test_every_name_and_the_name_of_a_recipe(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (home / JOURNAL).open("a") as file:
        file.write(json.dumps(lines(home)[2] | {"model": "blocked-only"}) + "\n")
    told = answer(capsys)
    assert [(line["model"], line["champion"] and line["champion"]["version"]) for line in told] == [
        ("blocked-only", None),
        (MODEL, 2),
    ]
    text, _ = ask(capsys)
    assert "blocked-only" in text and "has no champion" in text
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: other\nmodel: {base: b}\ndata: {path: d.jsonl}\npromote: {model_name: small}\n")
    assert answer(capsys, str(recipe))["version"] == 2


def test_a_damaged_record_is_refused_and_lines_of_a_newer_quench_are_said(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (home / JOURNAL).read_text()
    newer = lines(home)[2] | {"event": "retired", "version": 2}
    (home / JOURNAL).write_text(whole + json.dumps(newer) + "\n")
    out, err = ask(capsys, MODEL)
    assert "version 2 is champion" in out and "1 line about small cannot be read here" in err
    (home / JOURNAL).write_text("no json\n" + whole)
    out, err = ask(capsys, MODEL, code=2)
    assert out == "" and "The record of promotions is damaged" in err and "line 1" in err
