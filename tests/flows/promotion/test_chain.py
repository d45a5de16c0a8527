"""The chain and the looks through the real `promote` on a real home: a slow decline, bad input, a new test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.promotion.evidence import SCORES, rows_judged_on
from flows.promotion.journal import JOURNAL, Journal
from flows.promotion.promote import Decision, promote, roll_back, sentences
from tests.flows.promotion.weeks import Weeks

MODEL = "quickstart"


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry is a view and costs seconds each time; promotions.jsonl is what counts here."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")


def decide(weeks: Weeks, week: int, share: float, **more: Any) -> Decision:
    return promote(weeks.run(week, share, **more), weeks.home, say=lambda _: None)


def told(decision: Decision) -> str:
    return " ".join(decision.gate["text"])


def test_a_point_a_week_is_blocked_before_the_margin_is_lost(tmp_path: Path) -> None:
    """4,000 rows show each week's point; compared with the champion alone, every week would pass."""
    weeks = Weeks(tmp_path, test=4000)
    decisions = [decide(weeks, week, 0.90 - 0.01 * week) for week in range(1, 7)]
    events = [decision.event for decision in decisions]
    assert events[:2] == ["promoted", "promoted"] and set(events[2:]) == {"blocked"}, [told(one) for one in decisions]
    third = decisions[2].gate
    against = {check["against"]: check for check in third["tests"] if check["metric"] == "task"}
    assert against["champion"]["outcome"] == "pass"  # one point: nothing else would have stopped it
    assert against["the best version"]["outcome"] == "undecided"
    assert against["the best version"]["difference"] == pytest.approx(-0.02, abs=0.004)
    assert (third["champion"]["version"], third["best"]["version"]) == (2, 1)
    assert "Compared with the best version so far, version 1" in told(decisions[2])
    assert "The 6th candidate judged on these rows of test; decided at 99.9 %." in told(decisions[5])
    assert decisions[5].gate["outcome"] == "worse"
    lines = Journal(tmp_path, MODEL).lines()
    assert [line.look for line in lines] == [1, 2, 3, 4, 5, 6] and len({line.test for line in lines}) == 1
    said = " ".join(sentences(decisions[5]))
    assert said.startswith("Not promoted (worse); version 2 stays champion.")
    page = next(tmp_path.glob("runs/*-week-6/report.html")).read_text()
    assert "The versions before it" in page and 'aria-label="The chain of versions' in page
    assert "1 (best)" in next(tmp_path.glob("runs/*-week-6/report.md")).read_text()
    again = promote(next(tmp_path.glob("runs/*-week-6")), tmp_path, say=lambda _: None)
    assert again.gate["looks"]["number"] == 6  # the same candidate on the same rows


def test_after_the_last_look_nothing_is_decided_until_rows_are_new(tmp_path: Path) -> None:
    weeks = Weeks(tmp_path, test=1200, gate={"looks": 2})
    half = slice(0, 500)
    assert [decide(weeks, week, 0.9, part=half).event for week in (1, 2)] == ["promoted", "promoted"]
    third = decide(weeks, 3, 0.9, part=half)
    assert (third.event, third.gate["outcome"]) == ("blocked", "undecided")
    assert third.gate["text"][1].startswith(
        "The 3rd candidate judged on these rows of test; 2 is the most (gate.looks)"
    )
    grown = decide(weeks, 4, 0.9)  # 700 of 1,200 rows came since
    assert grown.gate["looks"]["number"] == 1 and grown.event == "promoted"
    assert grown.gate["chain"]["best"] == 1  # and it goes on with the chain: they share rows


def first_two(home: Path) -> Weeks:
    weeks = Weeks(home, test=2500)
    assert [decide(weeks, week, share).event for week, share in ((1, 0.9), (2, 0.895))] == ["promoted", "promoted"]
    return weeks


def gone(weeks: Weeks) -> str:
    shutil.rmtree(weeks.made[1].path.parent)
    return "its files are not what was promoted (It was removed)"


def without_scores(weeks: Weeks) -> str:
    (weeks.home / "promotions" / MODEL / "1" / SCORES).unlink()
    steps = next(weeks.home.glob("runs/*-week-1")) / "steps.json"
    raw = json.loads(steps.read_text())
    raw["steps"] = [step for step in raw["steps"] if step["stage"] != "evaluate"]
    steps.write_text(json.dumps(raw))
    return "no record of its scores is left"


def damaged_scores(weeks: Weeks) -> str:
    path = weeks.home / "promotions" / MODEL / "1" / SCORES
    path.write_bytes(path.read_bytes()[:100])
    return "its record cannot be read (ArrowInvalid"


def trained_on_most(weeks: Weeks) -> str:
    line = Journal(weeks.home, MODEL).lines()[0]
    rows = sorted(rows_judged_on(weeks.home, line) or ())
    path = weeks.home / "promotions" / MODEL / "1" / "train_rows.json"
    path.write_text(json.dumps({"dataset": None, "rows": rows[:1300], "note": None}))
    return "it was trained on 1,300 of these 2,500 rows"


def rolled_back(weeks: Weeks) -> str:
    roll_back(weeks.home, MODEL, 1, say=lambda _: None)
    return "it was rolled back"


def edited(weeks: Weeks, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = weeks.home / JOURNAL
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(change(json.loads(first))), *others]) + "\n")


def other_scorers(weeks: Weeks) -> str:
    edited(weeks, lambda line: {**line, "scoring": "another"})
    return "it was scored by other scorers than this run"


@pytest.mark.parametrize("harm", [gone, without_scores, damaged_scores, trained_on_most, rolled_back, other_scorers])
def test_versions_that_cannot_be_compared_with_are_left_out_and_said(
    tmp_path: Path, harm: Callable[[Weeks], str]
) -> None:
    weeks = first_two(tmp_path)
    why = harm(weeks)
    decision = decide(weeks, 3, 0.895)
    left_out = {line["version"]: line["reason"] for line in decision.gate["chain"]["left_out"]}
    (version,) = left_out
    assert left_out[version].startswith(why) and version == (2 if harm is rolled_back else 1)
    assert f"Left out of the chain: 1 (version {version}: {why}" in told(decision)
    assert decision.gate["chain"]["versions"] and decision.gate["best"] is None


def test_lines_of_another_layout_are_counted_and_their_versions_not_given_again(tmp_path: Path) -> None:
    weeks = first_two(tmp_path)
    edited(weeks, lambda line: {"model": MODEL, "version": 7, "arm": line["arm"], "verdict": "ok"})
    decision = decide(weeks, 3, 0.895)
    assert "Left out: 1 line of promotions.jsonl of another version of Quench" in told(decision)
    assert decision.promotion is not None and decision.promotion.version == 8


def test_lines_without_a_record_of_their_rows_are_said(tmp_path: Path) -> None:
    """As an older Quench wrote them, and the run's folder is gone, too."""
    weeks = first_two(tmp_path)
    old = {"test", "look", "scoring"}
    edited(weeks, lambda line: {name: value for name, value in line.items() if name not in old} | {"run": "gone"})
    decision = decide(weeks, 3, 0.895)
    assert decision.gate["looks"]["number"] == 2 and decision.gate["looks"]["unknown"] == 1
    assert "no record of its rows of test is left" in told(decision)


def test_a_test_that_shares_no_row_begins_a_chain(tmp_path: Path) -> None:
    weeks = Weeks(tmp_path, test=2400)
    assert decide(weeks, 1, 0.9, part=slice(0, 1200)).event == "promoted"
    decision = decide(weeks, 2, 0.9, part=slice(1200, 2400))
    assert decision.gate["looks"]["number"] == 1
    assert "shares no row with any that a promoted version was judged on: a new chain begins." in told(decision)
    assert decision.gate["champion"]["version"] == 1  # what it would replace is compared with as ever
    first, second = Journal(tmp_path, MODEL).lines()
    assert first.test != second.test
