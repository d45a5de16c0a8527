"""merge.base: auto from plan to report: decided at run time, by dev alone, and what is below stays a hit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.compose import Matrix, compose
from flows.pins import pin
from flows.plan.lookup import plan
from flows.report.build import render
from recipes.read.load import load
from tasks.runtime.store.local import Store
from tests.conftest import World
from tests.flows.synthetic_run import SyntheticRun
from tests.recipes.folders import write_project

DECIDED = {
    "candidate": "original",
    "rule": "the lower loss",
    "loss": {"dequantized": 1.25, "original": 1.2345},
    "difference": 0.0155,
    "ci95": [0.011, 0.02],
    "rows": 1234,
    "groups": 321,
    "tokens": 45678,
}


def composed(folder: Path, base: str) -> Matrix:
    loaded = load(folder / "recipe.yaml", sets=[f"merge.base={base}", "evaluate.on_base=[rtn-w4-g128]"])
    return compose(loaded.recipe, pin(loaded, folder / "home"), lambda step: None)


def test_every_policy_has_the_same_fingerprints(tmp_path: Path):
    write_project(tmp_path)
    matrices = {base: composed(tmp_path, base) for base in ("dequantized", "original", "auto")}
    prints = {base: {step.key: step.fingerprint for step in matrix.steps} for base, matrix in matrices.items()}
    assert prints["auto"] == prints["dequantized"] == prints["original"] and len(prints["auto"]) > 15
    (choice,) = (step for step in matrices["dequantized"].steps if step.stage == "choose")
    lineage = {name: (choice.lineage or {})[name].fingerprint for name in ("adapter", "base")}
    # Spelled out: whatever enters it moves every fingerprint below.
    assert choice.identity == {"stage": "choose", "version": 1, "params": {}, "inputs": lineage, "tools": {}}
    assert set(choice.inputs) == {"dequantized"}


def test_auto_reads_the_scores_of_both_merges_which_come_first(tmp_path: Path):
    write_project(tmp_path)
    order = [step.key for step in composed(tmp_path, "auto").steps]
    (choice,) = (step for step in composed(tmp_path, "auto").steps if step.stage == "choose")
    read = {name: one.key for name, one in choice.inputs.items()}  # type: ignore[union-attr]
    assert read == {
        "dequantized": "merge/test-dequantized",
        "original": "merge/test-original",
        "dequantized_scores": "evaluate/merged-dequantized",
        "original_scores": "evaluate/merged-original",
    }
    assert all(order.index(key) < order.index("choose/test") for key in read.values())
    assert len(order) == len(set(order))


def test_plan_says_that_the_run_decides(tmp_path: Path):
    write_project(tmp_path)
    why = {}
    for base in ("auto", "original"):
        loaded = load(tmp_path / "recipe.yaml", sets=[f"merge.base={base}"])
        lines = plan(loaded.recipe, pin(loaded, tmp_path / "home"), Store(tmp_path / "home"))
        why[base] = next(line.why for line in lines if line.key == "choose/test")
    assert why["auto"].startswith("decided at run time: dequantized or original")
    assert why["original"] == "after merge/test-original"


# ---- the report


def undecided(tmp_path: Path) -> tuple[SyntheticRun, Path]:
    """A run whose recipe left the merge base to it; the choose step is added by `decide`."""
    run = SyntheticRun(tmp_path, test=60, general=0, measured=False)
    folder = run.write()
    raw = json.loads((folder / "steps.json").read_text())
    for arm in raw["arms"]:
        if arm["scheme"] and not arm["on_base"]:
            arm["merge_base"] = "auto"
    (folder / "steps.json").write_text(json.dumps(raw))
    return run, folder


def decide(run: SyntheticRun, folder: Path, result: dict[str, Any], key: str = "choose/quickstart") -> None:
    """Write a step's result into its manifest; a step that the run has not is added."""
    raw = json.loads((folder / "steps.json").read_text())
    if key not in [step["key"] for step in raw["steps"]]:
        run.steps = raw["steps"]
        run._step(key, {}, seconds=0.5)
        (folder / "steps.json").write_text(json.dumps(raw))
    path = next(step["path"] for step in raw["steps"] if step["key"] == key)
    manifest = run.home / path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"result": result}))


def merge_answer(report: dict[str, Any]) -> str:
    return " ".join(next(one["text"] for one in report["answers"] if "merge base" in one["question"]))


def test_report_says_what_was_chosen_by_which_figures(tmp_path: Path):
    run, folder = undecided(tmp_path)
    decide(run, folder, DECIDED)
    report = render(folder, tmp_path).json
    assert report["choice"] == DECIDED
    assert report["arms"]["gptq-w4-g128"]["merge_base"] == "original"
    assert report["arms"]["gptq-w4-g128.on-base"]["merge_base"] is None
    said = merge_answer(report)
    assert "quantize merged-original, chosen by this run (merge.base: auto)" in said
    assert "1.2500 (dequantized) against 1.2345 (original), difference +0.0155 [+0.0110, +0.0200] nats a token" in said
    assert "45,678 tokens of 1,234 rows in 321 groups. Rule: the lower loss." in said
    assert ("gptq-w4-g128", "merged-original") in {(one["a"], one["b"]) for one in report["comparisons"]}
    for page in ("report.md", "report.html"):
        assert "chosen by this run" in (folder / page).read_text()
    # The answer's own sentence stays what the figures of test say.
    short = next(one["short"] for one in report["answers"] if "merge base" in one["question"])
    assert short.startswith("Merging into the dequantized base stays closer")


def test_report_of_a_fixed_base_and_of_a_choice_that_was_never_made(tmp_path: Path):
    run, folder = undecided(tmp_path)
    report = render(folder, tmp_path).json
    assert report["choice"] is None and report["arms"]["gptq-w4-g128"]["merge_base"] == "auto"
    reasons = {one["reason"] for one in report["comparisons_left_out"] if one["a"] == "gptq-w4-g128"}
    assert "merged-auto: no such scores" in reasons
    decide(run, folder, {"candidate": "dequantized"})
    report = render(folder, tmp_path).json
    assert report["arms"]["gptq-w4-g128"]["merge_base"] == "dequantized"
    assert "quantize merged-dequantized: the recipe names it (merge.base)." in merge_answer(report)
    why = "scored on different devices, merged-dequantized on cpu and merged-original on NVIDIA L4, compute 8.9"
    decide(run, folder, {"candidate": "dequantized", "rule": "the lower loss", "undecided": why})
    said = merge_answer(render(folder, tmp_path).json)
    assert f"This run could not decide (merge.base: auto): {why}. Rule: the lower loss." in said


def test_arms_that_nobody_could_choose_for_name_the_evaluation_that_failed(tmp_path: Path):
    _, folder = undecided(tmp_path)
    raw = json.loads((folder / "steps.json").read_text())
    why = {"what": "Logits are NaN.", "where": "dev", "why": "a layer overflows", "next": "look at it"}
    for step in raw["steps"]:
        if step["key"] == "evaluate/merged-original":
            step |= {"status": "failed", "path": None, "problem": why}
        elif step["stage"] in ("quantize", "evaluate") and step["slug"] == "gptq-w4-g128":
            step |= {"status": "skipped", "path": None, "problem": {**why, "what": "not run"}}
    (folder / "steps.json").write_text(json.dumps(raw))
    report = render(folder, tmp_path).json
    reason = report["arms"]["gptq-w4-g128"]["metrics"]["task"]["reason"]
    assert reason.startswith("evaluate/merged-original: Logits are NaN")
    assert report["arms"]["gptq-w4-g128.on-base"]["status"] == "ok"


def test_report_shows_the_weights_error_and_an_adapter_from_elsewhere(tmp_path: Path):
    run, folder = undecided(tmp_path)
    decide(run, folder, DECIDED)
    assert render(folder, tmp_path).json["error_over_delta"] is None
    ratio = {"modules": 14, "untouched": 0, "median": 2.345, "max": 8.76, "max_module": "model.layers.1.mlp.up_proj"}
    kinds = {"q_proj": {"median": 3.21, "max": 4.0}}
    decide(run, folder, {"error_over_delta": {**ratio, "by_kind": kinds}}, "merge/dequantized")
    decide(run, folder, {"trained_here": False, "provenance": "unknown"}, "train/quickstart")
    report = render(folder, tmp_path).json
    assert report["error_over_delta"]["median"] == 2.345
    assert report["adapter"] == {"trained_here": False, "provenance": "unknown"}
    said = merge_answer(report)
    assert "median 2.3 of 14 modules, largest 8.8 (model.layers.1.mlp.up_proj); medians by kind: q_proj 3.2" in said
    assert "trained elsewhere; the weights under it there: unknown" in said


# ---- a real run


def test_auto_from_plan_to_report_and_then_all_hits(world: World):
    auto = ("--set", "merge.base=auto")
    said = world.quench("plan", str(world.recipe), *auto).stdout
    assert "decided at run time: dequantized or original" in said
    world.quench("run", str(world.recipe), *auto)
    steps, report = world.steps(), world.report()
    made = {key for key, one in steps.items() if one["status"] == "made"}
    choice = json.loads((world.home / str(steps["choose/small"]["path"]) / "files" / "choice.json").read_text())
    assert choice == report["choice"] and choice["groups"] > 10
    assert choice["candidate"] == ("original" if choice["ci95"][0] > 0 else "dequantized")
    schemes = [arm["merge_base"] for slug, arm in report["arms"].items() if slug in ("gptq-w4-g128", "rtn-w4-g128")]
    assert schemes == [choice["candidate"]] * 2
    if choice["candidate"] == "dequantized":  # the model that the fixed recipe had quantized
        assert made == {"choose/small"}
    assert all(world.plan(*auto).values())
    assert all(world.plan().values())  # and the fixed recipe's artifacts are still there


def test_an_mlflow_run_holds_the_choice(small: World):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{small.home / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "small")
    runs = client.search_runs([experiment.experiment_id], "tags.`quench.kind` = 'run'")
    assert runs[-1].data.params["merge.chosen"] == "dequantized"
