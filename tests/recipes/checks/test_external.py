"""External models: names, folders and the reference, refused before anything is spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipes.arms import arms
from recipes.checks.check import load_and_check
from recipes.checks.external import external_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import load
from tests.recipes.folders import write_base, write_project


def problems(recipe: Path, *sets: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_and_check(recipe, sets=sets)
    assert all(all(problem.as_dict().values()) for problem in caught.value.problems)
    return list(caught.value.problems)


def test_external_arms_stand_under_their_names(tmp_path: Path):
    write_base(tmp_path / "project" / "prod")
    recipe = write_project(
        tmp_path / "project", extra="evaluate:\n  external:\n    prod: prod\n    big: {path: org/big, revision: v2}\n"
    )
    loaded = load_and_check(recipe)
    found = [arm for arm in arms(loaded.recipe) if arm.external]
    assert [(arm.slug, arm.kind, arm.external, arm.is_trained) for arm in found] == [
        ("prod", "external", True, False),
        ("big", "external", True, False),
    ]
    assert loaded.externals == {"prod": tmp_path / "project" / "prod", "big": None}


def test_names_are_their_own(tmp_path: Path):
    recipe = write_project(tmp_path)
    for name in ("base", "merged-original", "awq-w4-g128", "external", "champion"):
        (problem,) = problems(recipe, f"evaluate.external.{name}=base")
        assert problem.what == f"An external model cannot be called {name}."
        assert problem.where.endswith(f"evaluate.external.{name}")
    (problem,) = problems(recipe, "evaluate.external.Prod=base")
    assert "small letters" in problem.what
    (problem,) = problems(recipe, "evaluate.external={prod: {path: base, template: chatml}}")
    assert "`template` is no key" in problem.what and "chat_template" in problem.next


def test_folders_that_no_arm_can_be(tmp_path: Path):
    recipe = write_project(tmp_path)
    (problem,) = problems(recipe, "evaluate.external.prod=bas")
    assert "not there" in problem.what and "base?" in problem.next
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (problem,) = problems(recipe, f"evaluate.external.prod={adapter}")
    assert problem.what == "prod is an adapter, not a model." and f"quench merge BASE {adapter} OUT" in problem.next
    (tmp_path / "empty").mkdir()
    (problem,) = problems(recipe, f"evaluate.external.prod={tmp_path / 'empty'}")
    assert problem.what == "prod has no config.json."
    bare = write_base(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "model.safetensors").write_bytes((bare / "model.safetensors").read_bytes()[:-10])
    truncated, wordless = problems(recipe, f"evaluate.external.prod={bare}")
    assert "truncated" in truncated.what and "evaluate.external.prod" in truncated.where
    assert wordless.what == "prod has no tokenizer."


@pytest.mark.parametrize("layers", [True, "2", 2**63, [2], 0])
def test_sizes_that_the_plan_cannot_count_are_refused(tmp_path: Path, layers: object):
    recipe = write_project(tmp_path)
    config = write_base(tmp_path / "other") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers}))
    (problem,) = problems(recipe, f"evaluate.external.prod={tmp_path / 'other'}")
    assert "num_hidden_layers" in problem.what and "evaluate.external.prod" in problem.where


def test_code_that_comes_with_a_model_is_refused_and_a_quantized_model_is_not(tmp_path: Path):
    recipe = write_project(tmp_path)
    custom = {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "modeling.Strange"}}
    write_base(tmp_path / "custom", config=custom)
    (problem,) = problems(recipe, f"evaluate.external.prod={tmp_path / 'custom'}")
    assert "code of its own" in problem.what and "strange" in problem.why
    write_base(tmp_path / "known", config=custom | {"model_type": "llama"})  # transformers has it: no code is needed
    write_base(tmp_path / "gptq", config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    for name in ("known", "gptq"):
        load_and_check(recipe, sets=[f"evaluate.external.prod={tmp_path / name}"])
    assert external_headers(tmp_path / "gptq").weight_bytes > 0


def test_a_reference_is_an_external_model_with_the_bases_vocabulary(tmp_path: Path):
    recipe = write_project(tmp_path)
    (problem,) = problems(recipe, "evaluate.reference=prod")
    assert "no external model" in problem.what and "nf4-adapter" in problem.why
    words = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<end>", "id": 2}]}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(words))
    shutil.copytree(tmp_path / "base", tmp_path / "prod")
    sets = ["evaluate.external.prod=prod", "evaluate.reference=prod"]
    sets[0] = f"evaluate.external.prod={tmp_path / 'prod'}"
    load_and_check(recipe, sets=sets)
    words["added_tokens"] = []
    (tmp_path / "prod" / "tokenizer.json").write_text(json.dumps(words))
    (problem,) = problems(recipe, *sets)
    assert problem.what == "prod has another vocabulary than the base."
    assert "2 tokens here, 3 in the base" in problem.why


def test_paths_count_from_the_file_that_they_are_written_in(tmp_path: Path):
    write_base(tmp_path / "shared" / "prod")
    write_project(tmp_path / "shared", extra="evaluate:\n  external: {prod: prod, big: {path: prod}}\n")
    child = tmp_path / "own" / "recipe.yaml"
    child.parent.mkdir()
    child.write_text("extends: ../shared/recipe.yaml\nname: own\n")
    assert set(load(child).externals.values()) == {(tmp_path / "shared" / "prod").resolve()}
