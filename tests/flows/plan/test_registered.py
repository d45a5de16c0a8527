"""What a run can tell is registered before it: from earlier runs of this home where one tells, else from a guess."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.plan.registered import (
    REGISTERED,
    Earlier,
    counted,
    document_problems,
    earlier,
    foreseen,
    read_registered,
    register,
    registered_tag,
)
from flows.report.build import render
from recipes.checks.gate import SideSize
from recipes.checks.power import GUESSED, Scored
from recipes.data.rows import Side
from recipes.read.load import load
from recipes.schema import Recipe
from tests.conftest import QUICKSTART
from tests.flows.synthetic_run import SyntheticRun


def sizes(rows: int, *, each: int = 1) -> dict[Side, SideSize]:
    scored = Scored.of([each] * (rows // each)) if rows else Scored.of([])
    return {"test": SideSize(task=scored, tokens=scored, domains={}), "dev": SideSize(scored, scored, {})}


@pytest.fixture
def recipe() -> Recipe:
    return load(QUICKSTART / "recipe.yaml").recipe


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 400 rows with its report."""
    home = tmp_path_factory.mktemp("home")
    folder = SyntheticRun(home).write()
    render(folder, home)
    return folder


def ended(home: Path, recipe: Recipe, rendered: Path, *, id: str = "20260101-000000-quickstart-aaaa") -> Path:
    """A run of the recipe with that report; returns its folder."""
    folder = home / "runs" / id
    folder.mkdir(parents=True)
    shutil.copy(rendered / "report.json", folder)
    (folder / "recipe.resolved.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_an_earlier_run_it_is_a_guess(recipe: Recipe) -> None:
    told = foreseen(recipe, sizes(714, each=2), before=None)
    assert (told["rows"], told["groups"], told["changed"], told["guess"]) == (714, 357, GUESSED, True)
    first, more = told["text"]
    assert "Test has 714 rows in 357 groups: it shows a loss of 2.9 points" in first
    assert (
        "where 5 % of the answers change (a guess)" in first and "passes gate.task (2 points) 59 % of the time" in first
    )
    assert "about 1,120 rows fall on test, in groups like these" in more and told["rows_that_do"] == 1120
    assert len(foreseen(recipe, sizes(1200), before=None)["text"]) == 1  # enough


@pytest.mark.parametrize(
    ("rows", "words"),
    [({}, "not known yet"), (sizes(0), "no row of test has a prompt"), (sizes(4), "too few groups: 4;")],
)
def test_what_cannot_be_told_says_why(recipe: Recipe, rows: dict[Side, SideSize], words: str) -> None:
    told = foreseen(recipe, rows, before=None)
    assert told["smallest_loss"] is None and told["chance_to_pass"] is None
    assert words in told["reason"] and told["text"] == [
        f"Of the task score nothing can be told beforehand: {told['reason']}."
    ]


def test_the_last_run_of_the_name_tells_by_its_candidate(tmp_path: Path, recipe: Recipe, rendered: Path) -> None:
    assert earlier(tmp_path, recipe) is None
    ended(tmp_path, recipe, rendered)
    folder = ended(tmp_path, recipe, rendered, id="20260201-000000-quickstart-bbbb")
    (tmp_path / "runs" / "latest").symlink_to(folder.name)
    report = json.loads((folder / "report.json").read_text())
    line = next(line for line in report["power"] if line["arm"] == report["gate"]["candidate"])
    before = earlier(tmp_path, recipe)
    assert before is not None and (before.run, before.arm, before.rows) == (folder.name, line["arm"], 400)
    assert (before.changed, before.variance) == (line["changed"], line["variance"])
    told = foreseen(recipe, sizes(714), before=before)
    assert f"as in run {folder.name}: {before.arm} and merged-dequantized, 400 rows" in told["text"][0]
    assert told["earlier"]["run"] == folder.name and not told["guess"]


def test_without_a_candidate_the_scheme_in_the_middle_tells(tmp_path: Path, recipe: Recipe, rendered: Path) -> None:
    folder = ended(tmp_path, recipe, rendered)
    report = json.loads((folder / "report.json").read_text())
    edit(folder / "report.json", gate={"candidate": None})
    variances = sorted(line["variance"] for line in report["power"])
    before = earlier(tmp_path, recipe)
    assert before is not None and variances[0] < before.variance < variances[-1]


def test_runs_that_do_not_tell_are_passed_over(tmp_path: Path, recipe: Recipe, rendered: Path) -> None:
    """Another name, another scorer, a report from before this, few rows, a model that is never right, half a file."""
    good = ended(tmp_path, recipe, rendered)
    others = [ended(tmp_path, recipe, rendered, id=f"2026020{n}-000000-quickstart-bbbb") for n in range(1, 8)]
    named, scored, older, oldest, few, wrong, half = others
    edit(named / "recipe.resolved.json", name="another")
    edit(scored / "recipe.resolved.json", evaluate={"scorers": [{"kind": "exact-match"}]})
    report = json.loads((older / "report.json").read_text())
    edit(older / "report.json", power=[{**one, "variance": None} for one in report["power"]])
    bare = [{key: value for key, value in one.items() if key not in ("changed", "variance")} for one in report["power"]]
    edit(oldest / "report.json", power=bare)
    edit(few / "report.json", power=[one | {"rows": 99} for one in report["power"]])
    report["arms"]["merged-dequantized"]["metrics"]["task"]["value"] = 0.0
    edit(wrong / "report.json", arms=report["arms"])
    (half / "report.json").write_text("{")
    before = earlier(tmp_path, recipe)
    assert before is not None and before.run == good.name
    model = recipe.model_copy(update={"promote": recipe.promote.model_copy(update={"model_name": "another"})})
    renamed = earlier(tmp_path, model)
    assert renamed is not None and renamed.run == named.name  # one model name, whatever the recipe is called


def test_no_change_in_so_many_rows_is_not_never(tmp_path: Path, recipe: Recipe, rendered: Path) -> None:
    folder = ended(tmp_path, recipe, rendered)
    report = json.loads((folder / "report.json").read_text())
    edit(folder / "report.json", power=[one | {"changed": 0.0, "variance": 0.0} for one in report["power"]])
    before = earlier(tmp_path, recipe)
    assert before is not None and before.changed == before.variance == 1 / 400


def registered(recipe: Recipe, home: Path, *, rows: int = 714, before: Earlier | None = None, **more: Any) -> Any:
    more = {"inputs": ["base", "data"], "scored": []} | more
    return register(recipe, sizes(rows), home=home, before=before, **more)


def test_the_first_registration_of_a_recipe_and_its_data_is_kept(tmp_path: Path, recipe: Recipe) -> None:
    """A killed run's scores are known when it is run again: what it registered stays."""
    first = registered(recipe, tmp_path)
    folder = tmp_path / "runs" / "20260101-000000-quickstart-aaaa"
    folder.mkdir(parents=True)
    (folder / REGISTERED).write_text(json.dumps(first))
    assert first["kept_from"] is None and read_registered(folder) == first
    changed = Earlier(run="r", arm="a", against="b", rows=400, changed=0.2, variance=0.2)
    again = registered(recipe, tmp_path, before=changed, scored=["gptq-w4-g128"])
    assert again == first | {"kept_from": folder.name}
    later = folder.with_name("20260102-000000-quickstart-bbbb")
    later.mkdir()
    (later / REGISTERED).write_text(json.dumps(again))
    assert registered(recipe, tmp_path)["kept_from"] == folder.name
    elsewhere = recipe.model_copy(update={"run": recipe.run.model_copy(update={"threads": 7})})
    assert registered(elsewhere, tmp_path)["kept_from"] == folder.name  # the same recipe on another machine
    for other in (
        registered(recipe, tmp_path, inputs=["base", "more data"], before=changed, scored=["gptq-w4-g128"]),
        registered(recipe.model_copy(update={"name": "other"}), tmp_path, before=changed, scored=["gptq-w4-g128"]),
    ):
        assert (other["kept_from"], other["changed"], other["scored_before"]) == (None, 0.2, ["gptq-w4-g128"])


def test_documents_are_added_when_they_are_counted(tmp_path: Path, recipe: Recipe) -> None:
    scorers = [{"kind": "exact-match"}, {"kind": "lm-eval", "name": "sky", "tasks": ["gsm8k", "piqa"]}]
    raw = recipe.model_dump(mode="json") | {"evaluate": {"scorers": scorers}}
    recipe = Recipe.model_validate(raw)
    told = counted(registered(recipe, tmp_path), {"task.sky": {"gsm8k": 60, "piqa": 30}})
    assert told["documents"] == {"task.sky": 90}
    (problem,) = document_problems(recipe, told)
    assert problem.what == "The gate cannot pass: task.sky has 90 documents."
    assert problem.where == "evaluate.scorers.1.tasks" and "238 documents or more" in problem.next
    assert list(document_problems(recipe, told | {"documents": {"task.sky": 238}})) == []


def test_mlflow_gets_the_words(tmp_path: Path, recipe: Recipe) -> None:
    told = registered(recipe, tmp_path)
    assert registered_tag(told) == {"quench.registered": " ".join(told["text"])}
    assert registered_tag(read_registered(tmp_path)) == {}
