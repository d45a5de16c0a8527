"""External models in plan, prediction and report; evaluation of some arms alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flows.compose import compose
from flows.pins import pin
from flows.plan.memory import predict
from flows.plan.validate import validate
from flows.report.build import render
from recipes.checks.external import external_headers
from recipes.models.headers import read_headers
from recipes.problem import RecipeError
from recipes.read.load import Loaded, load
from tasks.runtime.step import Step
from tests.flows.synthetic_run import SyntheticRun, dump
from tests.recipes.folders import write_base, write_project

OTHER = "another tokenizer: 32,000 tokens, the base's has 4,096; 400 of 400 rows get other token ids"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A project with two external models."""
    for name in ("prod", "big"):
        write_base(tmp_path / "project" / name, hidden=256 if name == "big" else 128, template=name == "prod")
    extra = "quantize: {schemes: [rtn-w4-g128]}\nevaluate:\n  external: {prod: prod, big: big}\n"
    return write_project(tmp_path / "project", extra=extra)


def steps(loaded: Loaded, home: Path, *only: str) -> dict[str, Step]:
    found: list[Step] = []
    matrix = compose(loaded.recipe, pin(loaded, home), found.append, only=only)
    assert tuple(found) == matrix.steps
    seen: set[str] = set()
    for step in found:  # each after what it needs
        assert {one.key for one in step.inputs.values() if isinstance(one, Step)} <= seen
        seen.add(step.key)
    return {step.key: step for step in found}


def test_external_models_alone_need_no_training(recipe: Path, tmp_path: Path):
    loaded = load(recipe)
    found = steps(loaded, tmp_path, "external")
    arms = ("base", "prod", "big")
    assert set(found) == {
        "prepare/test",
        "rehearse/test",
        *(f"{stage}/{arm}" for stage in ("evaluate", "measure") for arm in arms),
    }
    assert "reference" not in found["evaluate/prod"].inputs
    with_one = steps(load(recipe, sets=["evaluate.reference=prod"]), tmp_path, "external")
    assert set(with_one) == {*found, "reference/test"}
    assert set(with_one["reference/test"].inputs) == {"dataset", "model"}
    assert all("reference" in with_one[f"evaluate/{arm}"].inputs for arm in arms)


def test_an_arm_alone_is_what_the_whole_run_makes(recipe: Path, tmp_path: Path):
    loaded = load(recipe)
    whole = steps(loaded, tmp_path)
    alone = steps(loaded, tmp_path, "rtn-w4-g128")
    assert {"train/test", "reference/test", "quantize/rtn-w4-g128", "evaluate/rtn-w4-g128"} <= set(alone)
    assert not {"evaluate/base", "evaluate/prod", "evaluate/merged-original", "merge/test-original"} & set(alone)
    assert {key: step.fingerprint for key, step in alone.items()} == {key: whole[key].fingerprint for key in alone}
    # Where the run decides, both merged models are scored for it.
    auto = steps(load(recipe, sets=["merge.base=auto"]), tmp_path, "rtn-w4-g128")
    assert {"evaluate/merged-original", "evaluate/merged-dequantized"} <= set(auto)
    assert whole["evaluate/prod"].inputs["reference"] is whole["reference/test"]
    assert "reference" not in steps(loaded, tmp_path, "base")["evaluate/base"].inputs


def test_bytes_of_an_external_model_are_its_identity(recipe: Path, tmp_path: Path):
    before = steps(load(recipe), tmp_path)
    shutil.copytree(recipe.parent / "prod", tmp_path / "moved")
    moved = steps(load(recipe, sets=[f"evaluate.external.prod={tmp_path / 'moved'}"]), tmp_path)
    assert {key: one.fingerprint for key, one in moved.items()} == {key: one.fingerprint for key, one in before.items()}
    (recipe.parent / "prod" / "tokenizer.json").write_text('{"other": 1}')
    after = steps(load(recipe), tmp_path)
    changed = {key for key, one in after.items() if one.fingerprint != before[key].fingerprint}
    assert changed == {"evaluate/prod", "measure/prod"}
    template = "evaluate.external={prod: {path: prod, chat_template: chatml}, big: big}"
    chatml = steps(load(recipe, sets=[template.replace("path: prod", f"path: {recipe.parent / 'prod'}")]), tmp_path)
    changed = {key for key, one in chatml.items() if one.fingerprint != after[key].fingerprint}
    assert changed == {"evaluate/prod"}


def test_arms_that_are_not_there_are_refused(recipe: Path, tmp_path: Path):
    with pytest.raises(RecipeError) as caught:
        validate(recipe, sets=[], home=tmp_path / "home", only=["prd", "external"])
    (problem,) = caught.value.problems
    assert problem.where == "--only prd" and problem.next == "Did you mean prod?"
    with pytest.raises(RecipeError, match="no external model"):
        validate(recipe, sets=["evaluate.external={}"], home=tmp_path / "home", only=["external"])
    validated = validate(recipe, sets=[], home=tmp_path / "home", only=["external"])
    assert [line.key for line in validated.plan] == list(steps(load(recipe), tmp_path, "external"))


def test_memory_follows_the_external_models_own_size(recipe: Path):
    loaded = load(recipe)
    externals = {name: external_headers(folder) for name, folder in loaded.externals.items() if folder}
    found = {one.key: one for one in predict(loaded.recipe, read_headers(recipe.parent / "base"), externals=externals)}
    assert found["evaluate/big"].parts["weights"] == externals["big"].weight_bytes / (1 << 30)
    assert found["evaluate/big"].needed_gib > found["evaluate/prod"].needed_gib
    judged = load(recipe, sets=["evaluate.reference=big"]).recipe
    again = {one.key: one for one in predict(judged, read_headers(recipe.parent / "base"), externals=externals)}
    assert "weights" in again["reference/test"].parts and "weights nf4" in found["reference/test"].parts


# ---- the report


def external_run(home: Path, *, reference: str | None = "nf4-adapter", only: tuple[str, ...] = ()) -> Path:
    """A synthetic run with `same` (the base's tokenizer) and `other` beside its arms; with `only`, of some arms."""
    folder = SyntheticRun(home).write()
    raw = json.loads((folder / "steps.json").read_text())
    raw["external"] = {}
    for number, name in enumerate(("same", "other")):
        model = home / "models" / name
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(b"0" * (1000 + number))
        raw["external"][name] = {"path": str(model), "digest": f"{number}e" * 32, "source": f"org/{name}@abc"}
        add_arm(home, raw, name, like="merged-original")
    table = pq.read_table(scores_of(home, raw, "other"))
    table = table.filter(pc.field("metric").isin(["bits", "task", "truncated"]))
    pq.write_table(table, scores_of(home, raw, "other"))
    say(home, raw, "other", {"absent": dict.fromkeys(("nll", "nll_all", "nll_general", "kl", "agree"), OTHER)})
    raw["reference"] = reference
    if only:
        raw["only"] = list(only)
        raw["arms"] = [arm for arm in raw["arms"] if arm["slug"] in ("base", "same", "other")]
        keys = {"prepare/quickstart", *(arm[stage] for arm in raw["arms"] for stage in ("evaluate", "measure"))}
        raw["steps"] = [step for step in raw["steps"] if step["key"] in keys]
    if reference is None:
        for slug in ("base", "same"):
            path = scores_of(home, raw, slug)
            table = pq.read_table(path)
            pq.write_table(table.filter(~pc.field("metric").isin(["kl", "agree"])), path)
            say(home, raw, slug, {"absent": dict.fromkeys(("kl", "agree"), "no reference: nothing was trained")})
    dump(folder / "steps.json", raw)
    return folder


def store(home: Path, raw: dict[str, Any], slug: str) -> Path:
    return home / next(step["path"] for step in raw["steps"] if step["key"] == f"evaluate/{slug}")


def scores_of(home: Path, raw: dict[str, Any], slug: str) -> Path:
    return store(home, raw, slug) / "files" / "scores.parquet"


def say(home: Path, raw: dict[str, Any], slug: str, result: dict[str, Any]) -> None:
    path = store(home, raw, slug) / "manifest.json"
    dump(path, json.loads(path.read_text()) | {"result": result})


def add_arm(home: Path, raw: dict[str, Any], name: str, *, like: str) -> None:
    """An external arm with the scores and speed of another one."""
    for stage in ("evaluate", "measure"):
        step = next(one for one in raw["steps"] if one["key"] == f"{stage}/{like}")
        path = step["path"].replace(like, name)
        shutil.copytree(home / step["path"], home / path)
        raw["steps"].append(step | {"key": f"{stage}/{name}", "slug": name, "path": path})
    arm = next(one for one in raw["arms"] if one["slug"] == like)
    own = {"slug": name, "kind": "external", "external": True, "merge_base": None, "model": None, "adapter": None}
    raw["arms"].append(arm | own | {"evaluate": f"evaluate/{name}", "measure": f"measure/{name}"})


def test_another_tokenizer_has_null_cells_with_the_reason(tmp_path: Path):
    report = render(external_run(tmp_path), tmp_path).json
    other, same = report["arms"]["other"]["metrics"], report["arms"]["same"]["metrics"]
    nulls = {name for name, cell in other.items() if cell["value"] is None}
    assert nulls == {"ppl_test", "ppl_all", "ppl_general", "kl_mean", "kl_p99", "top1_agreement"}
    assert all(other[name]["reason"] == OTHER for name in nulls)
    assert other["bits_per_byte"]["value"] == same["bits_per_byte"]["value"] > 0 and other["task"]["ci95"]
    assert all(same[name]["value"] is not None for name in nulls)
    assert report["not_ranked"]["other"] == f"ppl_test: {OTHER}" and "same" not in report["not_ranked"]
    assert (same["size_bytes"]["value"], other["size_bytes"]["value"]) == (1000, 1001)
    assert report["arms"]["other"]["external"] == {"source": "org/other@abc", "digest": "1e" * 32}
    assert report["arms"]["base"]["external"] is None
    assert "bits/byte" in (tmp_path / "runs" / report["id"] / "report.md").read_text()
    domains = report["domains"]["other"]
    assert domains and {name.split("@")[0] for name in domains} == {"task", "bits_per_byte"}


def test_external_models_are_compared_with_the_merged_model_that_is_quantized(tmp_path: Path):
    report = render(external_run(tmp_path), tmp_path).json
    made = [one for one in report["comparisons"] if one["family"] == "external"]
    assert {(one["a"], one["b"], one["metric"]) for one in made} == {
        *(("same", "merged-dequantized", metric) for metric in ("task", "bits_per_byte", "ppl_test", "kl_mean")),
        *(("other", "merged-dequantized", metric) for metric in ("task", "bits_per_byte")),
    }
    assert {one["family_size"] for one in made} == {6}
    left = {(one["a"], one["metric"]): one["reason"] for one in report["comparisons_left_out"]}
    assert left["other", "kl_mean"] == left["other", "ppl_test"] == f"other: {OTHER}"
    # `same` has merged-original's scores: its comparison is that one's.
    like = next(one for one in report["comparisons"] if one["family"] == "merge" and one["metric"] == "kl_mean")
    kl = next(one for one in made if one["metric"] == "kl_mean")
    assert kl["difference"] == pytest.approx(-like["difference"])
    (answer,) = [one for one in report["answers"] if one["question"] == "How do models from elsewhere compare?"]
    assert any("other has no perplexity and no KL: another tokenizer" in line for line in answer["text"])


def test_a_run_of_external_models_alone_says_what_it_cannot(tmp_path: Path):
    rendered = render(external_run(tmp_path, reference=None, only=("external",)), tmp_path)
    report = rendered.json
    assert list(report["arms"]) == ["base", "same", "other"] and report["reference"] is None
    assert report["only"] == ["external"] and not report["failures"]
    assert report["arms"]["same"]["metrics"]["kl_mean"]["reason"].startswith("no reference: ")
    assert report["not_ranked"] == {"other": f"ppl_test: {OTHER}"}  # KL is nobody's, so nobody is left out for it
    cannot = [one["short"] for one in report["answers"] if one["short"].startswith("This run cannot say: ")]
    assert len(cannot) == 4
    assert any(line.startswith("same against base: task score ") for line in report["verdict"])
    assert {one["b"] for one in report["comparisons"]} == {"base"}
    assert "This run cannot say" in rendered.markdown


def test_an_external_reference_is_named_wherever_kl_is(tmp_path: Path):
    report = render(external_run(tmp_path, reference="same"), tmp_path).json
    assert report["reference"] == "same" and "KL(same || arm)" in report["meanings"]["kl_mean"]
    own, trained = (report["arms"][slug]["metrics"]["kl_mean"] for slug in ("same", "nf4-adapter"))
    assert own["value"] == 0 and own["ci95"] is None and trained["ci95"] is not None
    told = json.dumps(report["answers"])
    assert "closer to same" in told or "further from same" in told
    assert "the trained model" not in told
