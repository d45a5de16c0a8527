"""`quench evaluate`: models from elsewhere by the command that people type, without a training."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import QUICKSTART, World, write_small_recipe
from tests.tiny import other_tokenizer, write_base


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> World:
    """A home in which three external models were evaluated: a copy of the base, another tokenizer, a damaged one."""
    folder = tmp_path_factory.mktemp("external")
    recipe = write_small_recipe(folder / "project")
    shutil.copytree(QUICKSTART / "base", recipe.parent / "twin")
    write_base(recipe.parent / "stranger", tokenizer=other_tokenizer())
    shutil.copytree(QUICKSTART / "base", recipe.parent / "damaged")
    file = recipe.parent / "damaged" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    names = "external: {twin: twin, stranger: stranger, damaged: damaged}"
    recipe.write_text(recipe.read_text().replace("evaluate:\n", f"evaluate:\n  {names}\n"))
    world = World(home=folder / "home", recipe=recipe, api=prefect_api)
    world.home.mkdir()
    world.quench("evaluate", str(recipe), "--only", "external", check=1)  # the damaged one's
    return world


def test_a_model_that_does_not_load_fails_its_own_cells(finished: World):
    report, steps = finished.report(), finished.steps()
    assert not {key.split("/")[0] for key in steps} & {"train", "merge", "quantize", "reference", "calibrate", "choose"}
    assert {key for key, one in steps.items() if one["status"] == "failed"} == {"evaluate/damaged", "measure/damaged"}
    damaged = report["arms"]["damaged"]
    assert damaged["status"] == "failed" and "damaged" in report["not_ranked"]
    assert all("o_proj" in damaged["metrics"][name]["reason"] for name in ("task", "ppl_test", "load_s"))
    assert all(report["arms"][slug]["status"] == "ok" for slug in ("base", "twin", "stranger"))


def test_the_base_under_another_name_is_no_different(finished: World):
    report = finished.report()
    base, twin = (report["arms"][slug]["metrics"] for slug in ("base", "twin"))
    for name in ("task", "ppl_test", "bits_per_byte", "ppl_general"):
        assert base[name] == twin[name] and base[name]["value"] is not None, name
    assert twin["size_bytes"]["value"] == base["size_bytes"]["value"]
    assert twin["kl_mean"]["reason"].startswith("no reference: ")
    made = {(one["a"], one["metric"]): one for one in report["comparisons"] if one["family"] == "external"}
    assert {metric for slug, metric in made if slug == "twin"} == {"task", "bits_per_byte", "ppl_test"}
    assert all(one["verdict"] == "no difference shown" for (slug, _), one in made.items() if slug == "twin")
    assert made["stranger", "bits_per_byte"]["verdict"] == "worse"  # random weights
    assert report["arms"]["stranger"]["metrics"]["ppl_test"]["reason"].startswith("another tokenizer: ")
    assert any("This run cannot say: " in one["short"] for one in report["answers"])


def test_again_it_is_all_hits_but_what_failed(finished: World):
    planned = finished.plan("--only", "external")
    assert {key for key, hit in planned.items() if not hit} == {"evaluate/damaged", "measure/damaged"}
    alone = finished.plan("--only", "twin", "--set", "evaluate.reference=twin")
    assert {key for key, hit in alone.items() if not hit} == {"reference/small", "evaluate/twin"}
    said = finished.quench("evaluate", str(finished.recipe), "--only", "twins", check=2).stderr
    assert "The recipe has no arm twins" in said and "Did you mean twin?" in said
