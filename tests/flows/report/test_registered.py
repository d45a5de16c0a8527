"""The report says what was registered before the run beside what was found, and never registers anything itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.plan.registered import REGISTERED, foreseen
from flows.report.build import render
from recipes.checks.gate import SideSize
from recipes.checks.power import Scored
from recipes.read.load import load
from tests.conftest import QUICKSTART
from tests.flows.synthetic_run import SyntheticRun


def told(folder: Path, **changes: Any) -> dict[str, Any]:
    """A registration in a run's folder."""
    scored = Scored.of([1] * 410)  # ten of them turn out too long
    size = SideSize(scored, scored, {})
    seen = foreseen(load(QUICKSTART / "recipe.yaml").recipe, {"test": size, "dev": size}, before=None)
    made = {"identity": "x", "kept_from": None, "scored_before": [], **seen, "documents": {}} | changes
    (folder / REGISTERED).write_text(json.dumps(made))
    return made


def test_a_run_without_a_registration_says_nothing_of_it(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path).write()
    report = render(folder, tmp_path)
    assert report.json["registered"] is None and not (folder / REGISTERED).exists()
    assert "egistered" not in report.markdown and "egistered" not in (folder / "report.html").read_text()


def test_both_stand_beside_the_verdict(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path).write()
    before = told(folder)
    report = render(folder, tmp_path)
    told_again = report.json["registered"]
    assert told_again is not None and json.loads((folder / REGISTERED).read_text()) == before
    assert {name: told_again[name] for name in before if name != "text"} == {
        name: value for name, value in before.items() if name != "text"
    }
    first, *_, last = told_again["text"]
    assert first.startswith("Registered before anything was spent: test has 410 rows in 410 groups: it shows")
    found, gate = told_again["found"], report.json["gate"]
    line = next(one for one in report.json["power"] if one["arm"] == gate["candidate"])
    check = next(one for one in gate["tests"] if (one["metric"], one["against"]) == ("task", "merged-dequantized"))
    assert (found["arm"], found["changed"]) == (gate["candidate"], line["changed"])
    assert (found["difference"], found["outcome"]) == (check["difference"], check["outcome"])
    assert last.startswith(f"Found: {100 * line['changed']:.2g} % of 400 answers (registered were 410) changed")
    assert last.endswith(f": {check['outcome']}.")
    for page in (report.markdown, (folder / "report.html").read_text().replace("&#39;", "'")):
        assert "Registered before anything was spent" in page and "(registered were 410)" in page


def test_it_says_when_scores_were_known_and_whose_registration_it_is(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path, test=60).write()
    told(folder, scored_before=["gptq-w4-g128"], kept_from="20260101-quickstart-aaaa", documents={"task.sky": 90})
    report = render(folder, tmp_path)
    assert report.json["registered"] is not None
    first, *more = report.json["registered"]["text"]
    assert first.startswith(
        "Registered when gptq-w4-g128 had been scored already, by run 20260101-quickstart-aaaa of the same recipe"
    )
    assert "lm-eval tasks of task.sky: 90 documents." in more


def test_without_a_candidate_nothing_was_found(tmp_path: Path) -> None:
    refused = {slug: "vLLM does not read it." for slug in ("gptq-w4-g128", "gptq-w4-g32", "awq-w4-g128")}
    refused |= dict.fromkeys(("gptq-w3-g128", "rtn-w4-g128", "rtn-w3-g128"), "nor this")
    folder = SyntheticRun(tmp_path, test=60, refused=refused).write()
    told(folder)
    report = render(folder, tmp_path).json
    assert report["gate"]["candidate"] is None and report["registered"] is not None
    assert report["registered"]["found"] is None
    assert report["registered"]["text"][-1].startswith("Found: no candidate was compared")
