"""`quench compare`: pairs on shared rows, what is left out is counted, what would not be alike is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from flows.cli import main
from flows.commands.compare import COMPARED, Compared, Shared, compare_runs, print_compared
from recipes.arms import NOT_DECODED
from recipes.problem import RecipeError
from tests.flows.synthetic_run import SHAPES, SyntheticRun

FEW = {slug: SHAPES[slug] for slug in ("base", "nf4-adapter", "merged-dequantized", "gptq-w4-g128")}
LATER = "20261125-120000-quickstart-cd34"


def write(home: Path, **changes: Any) -> Path:
    return SyntheticRun(home, **{"test": 300, "general": 60, "measured": False, "shapes": FEW, **changes}).write()


def later(home: Path, **changes: Any) -> Path:
    return write(home, run_id=LATER, salt="later", **changes)


def change(found: Compared, arm: str, metric: str) -> Any:
    return next(one for one in found.changes if (one.arm, one.metric) == (arm, metric))


def test_the_same_scores_in_two_runs_are_never_different(tmp_path: Path) -> None:
    found = compare_runs(write(tmp_path), later(tmp_path), tmp_path)
    assert found.rows == {"test": Shared(300, 0, 0), "general": Shared(60, 0, 0)}
    assert {one.verdict for one in found.changes} == {"no difference shown"}
    assert all(one.difference == 0 and one.before == one.after for one in found.changes)
    assert found.left_out == [] and set(found.same_files) == set(FEW)
    assert {one.family_size for one in found.changes} == {len(found.changes)}
    assert {(one.arm, one.metric) for one in found.changes} == {
        (arm, metric)
        for arm in FEW
        for metric in COMPARED
        if (arm, metric) != ("nf4-adapter", "kl_mean")  # zero by definition, in both
    }


def test_planted_damage_is_worse_and_only_there(tmp_path: Path) -> None:
    hurt = {**FEW, "gptq-w4-g128": replace(FEW["gptq-w4-g128"], kl=0.03, loss=0.04, task=0.78)}
    found = compare_runs(write(tmp_path), later(tmp_path, shapes=hurt), tmp_path)
    words = {(one.arm, one.metric): one.verdict for one in found.changes}
    assert {words["gptq-w4-g128", metric] for metric in ("task", "ppl_test", "kl_mean")} == {"worse"}
    assert {word for (arm, _), word in words.items() if arm != "gptq-w4-g128"} == {"no difference shown"}
    back = compare_runs(tmp_path / "runs" / LATER, tmp_path / "runs" / SyntheticRun.run_id, tmp_path)
    one, other = change(found, "gptq-w4-g128", "task"), change(back, "gptq-w4-g128", "task")
    assert (other.verdict, other.difference) == ("better", pytest.approx(-one.difference))


def test_a_run_that_took_answers_without_an_end_as_finished_is_not_compared_by_task(tmp_path: Path) -> None:
    arm, before, after = "gptq-w4-g128", write(tmp_path), later(tmp_path, cut={"gptq-w4-g128": 4})
    assert change(compare_runs(before, after, tmp_path), arm, "task").verdict == "no difference shown"
    for slug in FEW:  # an older version's scores
        path = next(tmp_path.glob(f"store/evaluate/{slug}-{folder_mark(before, slug)}*/files/scores.parquet"))
        table = pd.read_parquet(path)
        table[table.metric != "truncated"].to_parquet(path)
    found = compare_runs(before, after, tmp_path)
    (left,) = [one for one in found.left_out if one.metric == "task"]
    assert left.a == arm and left.reason.startswith("answers without an end score 0 in one of the runs")
    assert change(found, arm, "ppl_test") and change(found, "base", "task")


def test_only_shared_rows_count_and_the_others_are_told(tmp_path: Path) -> None:
    before = write(tmp_path, test=380, part=slice(0, 300))
    after = later(tmp_path, test=380, part=slice(80, 380))  # 80 rows went, 80 others came
    found = compare_runs(before, after, tmp_path)
    assert found.rows["test"] == Shared(220, 80, 80)
    one = change(found, "gptq-w4-g128", "ppl_test")
    tables = [
        pd.read_parquet(next(tmp_path.glob(f"store/evaluate/gptq-w4-g128-{mark}*/files/scores.parquet")))
        for mark in (folder_mark(before), folder_mark(after))
    ]
    nll = [table[(table.metric == "nll") & (table.split == "test")].set_index("row") for table in tables]
    both = nll[0].index.intersection(nll[1].index)
    assert (len(both), one.rows) == (220, 220)
    for table, value in zip(nll, (one.before, one.after), strict=True):
        assert value == pytest.approx(np.exp(table.loc[both, "sum"].sum() / table.loc[both, "n"].sum()))


def folder_mark(run: Path, slug: str = "gptq-w4-g128") -> str:
    """How the fingerprint of the run's evaluate step of an arm begins."""
    steps = json.loads((run / "steps.json").read_text())["steps"]
    return next(one["fingerprint"][:12] for one in steps if one["key"] == f"evaluate/{slug}")


def test_kl_to_another_reference_is_not_compared(tmp_path: Path) -> None:
    found = compare_runs(write(tmp_path), later(tmp_path, remade="again"), tmp_path)
    assert {one.metric for one in found.changes} == {*COMPARED} - {"kl_mean"}
    assert {(one.metric, one.reason) for one in found.left_out} == {
        ("kl_mean", "each run's KL is to its own reference, and they are not the same")
    }
    assert found.same_files == ["base"]


def test_another_scorer_is_not_compared(tmp_path: Path) -> None:
    before, after = write(tmp_path), later(tmp_path)
    recipe = json.loads((after / "recipe.resolved.json").read_text())
    recipe["evaluate"]["scorers"][0]["kind"] = "exact-match"
    (after / "recipe.resolved.json").write_text(json.dumps(recipe))
    found = compare_runs(before, after, tmp_path)
    assert {one.metric for one in found.left_out} == {"task"}
    assert "score answers otherwise" in found.left_out[0].reason


def test_a_further_scorer_leaves_the_first_one_comparable(tmp_path: Path) -> None:
    before, after = write(tmp_path), later(tmp_path)
    recipe = json.loads((after / "recipe.resolved.json").read_text())
    recipe["evaluate"]["scorers"].append({"kind": "exact-match", "name": None})
    (after / "recipe.resolved.json").write_text(json.dumps(recipe))
    assert "task" in {one.metric for one in compare_runs(before, after, tmp_path).changes}


def test_a_scorer_that_reads_another_file_is_not_compared(tmp_path: Path) -> None:
    before, after = write(tmp_path), later(tmp_path)
    for path in tmp_path.glob(f"store/evaluate/*-{folder_mark(after)}/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest.setdefault("inputs", {})["scorer-0"] = {"digest": "of another file"}
        path.write_text(json.dumps(manifest))
    found = compare_runs(before, after, tmp_path)
    assert "task" in {one.metric for one in found.left_out}


def test_other_tokens_of_the_same_rows_are_not_compared(tmp_path: Path) -> None:
    before, after = write(tmp_path), later(tmp_path)
    for path in tmp_path.glob(f"store/evaluate/*-{folder_mark(after)}/files/scores.parquet"):
        table = pd.read_parquet(path)
        table.loc[table.metric == "nll", "n"] += 1
        table.to_parquet(path)
    found = compare_runs(before, after, tmp_path)
    (one,) = found.left_out
    assert (one.a, one.metric) == ("gptq-w4-g128", "ppl_test") and "other tokens" in one.reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"test": 600, "part": slice(300, 600), "general": 0}, "share no row"),
        ({"shapes": {"merged-original": SHAPES["merged-original"]}}, "no arm in common"),
    ],
)
def test_runs_with_nothing_in_common_are_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    before = write(tmp_path, general=0)
    with pytest.raises(RecipeError) as caught:
        compare_runs(before, later(tmp_path, **changes), tmp_path)
    (problem,) = caught.value.problems
    assert why in problem.why and problem.next
    with pytest.raises(RecipeError, match="one run"):
        compare_runs(before, before, tmp_path)


def test_arms_of_one_run_only_are_named(tmp_path: Path) -> None:
    more = {**FEW, "rtn-w4-g128": SHAPES["rtn-w4-g128"]}
    found = compare_runs(write(tmp_path, shapes=more), later(tmp_path), tmp_path)
    assert (found.only_before, found.only_after) == (["rtn-w4-g128"], [])


def test_models_from_elsewhere_are_the_same_files_by_their_digest(tmp_path: Path) -> None:
    folders = write(tmp_path), later(tmp_path)
    for folder, digest in zip(folders, ("1" * 64, "2" * 64), strict=True):
        steps = json.loads((folder / "steps.json").read_text())
        arm = next(one for one in steps["arms"] if one["slug"] == "base") | {"slug": "served", "external": True}
        origin = {"served": {"path": "served", "digest": digest, "source": "served"}}
        (folder / "steps.json").write_text(json.dumps({**steps, "arms": [*steps["arms"], arm], "external": origin}))
    found = compare_runs(*folders, tmp_path)
    assert set(found.same_files) == set(FEW) and "served" in {one.arm for one in found.changes}


def test_scores_of_further_scorers_are_compared(tmp_path: Path) -> None:
    folders = write(tmp_path), later(tmp_path)
    for path in tmp_path.glob("store/evaluate/*/files/scores.parquet"):
        table = pd.read_parquet(path)
        more = table[table.metric == "task"].assign(metric="task.polite")
        pd.concat([table, more]).to_parquet(path)
    found = compare_runs(*folders, tmp_path)
    assert {one.arm for one in found.changes if one.metric == "task.polite"} == set(FEW)


@pytest.mark.parametrize("width", [80, 120])
def test_it_prints_in_a_terminal(tmp_path: Path, width: int) -> None:
    hurt = {**FEW, "gptq-w4-g128": replace(FEW["gptq-w4-g128"], task=0.7)}
    before = write(tmp_path, test=380, part=slice(0, 300))
    found = compare_runs(before, later(tmp_path, shapes=hurt, test=380, part=slice(80, 380)), tmp_path)
    console = Console(width=width)
    with console.capture() as captured:
        print_compared(found, console)
    text = captured.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert "220 rows in both are compared; 80 only before and 80" in " ".join(text.split())
    assert "worse" in text and "gptq-w4-g128" in text and text.count("points") == len(FEW)
    assert ("no room for before, after" in text) == (width < 100)


def test_the_command_prints_json_or_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUENCH_HOME", str(tmp_path))
    before, after = write(tmp_path), later(tmp_path)
    assert main(["compare", "--json", before.name, after.name]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["before"], said["after"]) == (before.name, after.name)
    assert said["rows"]["test"] == {"both": 300, "only_before": 0, "only_after": 0}
    assert all(one["ci95_adjusted"][0] <= one["difference"] for one in said["comparisons"])
    assert main(["compare", before.name, before.name]) == 2
    assert main(["compare", before.name, "nothing"]) == 2


# ---- dev


def test_dev_is_compared_alone(tmp_path: Path) -> None:
    hurt = {**FEW, "gptq-w4-g128": replace(FEW["gptq-w4-g128"], kl=0.03, loss=0.04, task=0.78)}
    folders = write(tmp_path), later(tmp_path, shapes=hurt)
    on_test = compare_runs(*folders, tmp_path)
    for path in tmp_path.glob("store/evaluate/*/files/scores.parquet"):
        table = pd.read_parquet(path)
        table.loc[table.split != "dev", "sum"] = np.nan  # what test says plays no part
        table.to_parquet(path)
    found = compare_runs(*folders, tmp_path, split="dev")
    assert (found.split, found.rows, found.served) == ("dev", {"dev": Shared(300, 0, 0)}, {})
    names = {one.metric for one in found.changes}
    assert names == {"task", "ppl_dev", "ppl_all", "bits_per_byte", "kl_mean"}  # general rows are no dev rows
    assert (on_test.split, {one.metric for one in on_test.changes} - names) == ("test", {"ppl_test", "ppl_general"})
    words = {(one.arm, one.metric): one.verdict for one in found.changes}
    assert {words["gptq-w4-g128", metric] for metric in ("task", "ppl_dev", "kl_mean")} == {"worse"}
    one, other = change(found, "gptq-w4-g128", "ppl_dev"), change(on_test, "gptq-w4-g128", "ppl_test")
    assert one.after == pytest.approx(other.after) and one.difference == pytest.approx(other.difference)


def test_dev_rows_of_one_run_only_are_left_out_and_other_sets_refused(tmp_path: Path) -> None:
    before = write(tmp_path, test=380, part=slice(0, 300), general=0)
    after = later(tmp_path, test=380, part=slice(80, 380), general=0)
    assert compare_runs(before, after, tmp_path, split="dev").rows == {"dev": Shared(220, 80, 80)}
    other = write(
        tmp_path, test=600, part=slice(400, 600), general=0, run_id="20261126-120000-quickstart-ef56", salt="other"
    )
    with pytest.raises(RecipeError, match="the two dev sets share no row"):
        compare_runs(before, other, tmp_path, split="dev")


def test_answers_to_dev_that_were_not_decoded_are_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path, undecoded=frozenset({"gptq-w4-g128"}))
    after = later(tmp_path, undecoded=frozenset({"gptq-w4-g128", "merged-dequantized"}))
    found = compare_runs(before, after, tmp_path, split="dev")
    reasons = {(one.a, one.reason) for one in found.left_out if one.metric == "task"}
    assert reasons == {
        ("gptq-w4-g128", NOT_DECODED),
        ("merged-dequantized", "not decoded after: nothing chooses by it"),
    }
    told = {(one.arm, one.metric) for one in found.changes}
    assert ("gptq-w4-g128", "task") not in told and ("gptq-w4-g128", "ppl_dev") in told
    assert change(compare_runs(before, after, tmp_path), "gptq-w4-g128", "task").rows == 300  # of test
    monkeypatch.setenv("QUENCH_HOME", str(tmp_path))
    assert main(["compare", before.name, after.name, "--split", "dev"]) == 0
    assert f"Not compared, {NOT_DECODED}: gptq-w4-g128 (task)." in " ".join(capsys.readouterr().out.split())


def test_the_command_says_which_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUENCH_HOME", str(tmp_path))
    names = [folder.name for folder in (write(tmp_path), later(tmp_path))]
    for words, split in (([], "test"), (["--split", "dev"], "dev")):
        assert main(["compare", *names, *words, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["split"] == split and split in said["rows"]
        assert main(["compare", *names, *words]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"{split}: 300 rows in both are compared" in text
        assert ("Dev is for tuning" in text) == (split == "dev")
    with pytest.raises(SystemExit):
        main(["compare", *names, "--split", "train"])
