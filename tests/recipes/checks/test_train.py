"""What train and run ask of the base: wrong names, experts, batches, devices, refused before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.checks.check import check
from recipes.checks.train import device_problems, unquantized_warnings
from recipes.problem import Problem, RecipeError
from recipes.read.load import load
from tests.recipes.folders import llama_shapes, write_project, write_safetensors


def problems(recipe: Path, *sets: str) -> list[Problem]:
    return check(load(recipe, sets=sets))


@pytest.mark.parametrize(
    ("set_", "said"),
    [
        ("train.rank_pattern={q_prj: 4}", "q_prj"),
        ("train.rank_pattern={lm_head: 4}", "lm_head"),
        ("train.alpha_pattern={'q_proj(': 4}", "regular expression"),
        ("train.modules_to_save=[embed]", "Name one of these"),
        ("train.modules_to_save=[proj]", "4-bit weights cannot be trained"),
        ("train.attention=flash_attention_2", "flash"),
    ],
)
def test_names_that_the_base_does_not_have(tmp_path: Path, set_: str, said: str):
    (problem,) = problems(write_project(tmp_path), set_)
    assert said in str(problem) and set_.split("=")[0] in problem.where


def test_what_peft_matches_is_accepted(tmp_path: Path):
    recipe = write_project(tmp_path)
    sets = ("train.rank_pattern={layers.0.mlp.down_proj: 4, '.*[qk]_proj': 2}", "train.modules_to_save=[norm, lm_head]")
    assert problems(recipe, *sets) == []
    assert len(problems(recipe, *sets, "train.targets=[q_proj]")) == 1  # down_proj gets no adapter now


def write_with_tower(tmp_path: Path) -> Path:
    """Gemma 3's names: `language_model.model.layers` in the file, `model.language_model.layers` when it is loaded."""
    text = llama_shapes(hidden=128, intermediate=256, kv=64, layers=2, vocabulary=300)
    shapes = {f"language_model.{name}": shape for name, shape in text.items()}
    for number in range(3):
        shapes[f"vision_tower.encoder.layers.{number}.mlp.fc1.weight"] = [96, 48]
        shapes[f"vision_tower.encoder.layers.{number}.final.norm.weight"] = [48]
    shapes["multi_modal_projector.linear_1.weight"] = [128, 48]
    recipe = write_project(tmp_path)
    (file,) = tmp_path.rglob("config.json")
    config = json.loads(file.read_text())
    text_config = {**config, "model_type": "llama", "head_dim": 32, "tie_word_embeddings": True}
    file.write_text(json.dumps({"model_type": "llava", "text_config": text_config}))
    write_safetensors(file.parent / "model.safetensors", shapes)
    return recipe


@pytest.mark.parametrize(
    ("set_", "said"),
    [
        ("train.targets=[fc1]", "No linear layer of the base's text decoder is called fc1"),
        ("train.targets=[linear_1]", "No linear layer of the base's text decoder is called linear_1"),
        ("train.rank_pattern={fc1: 4}", "names no layer that gets an adapter"),
        ("train.rank_pattern={encoder.layers.0.mlp.fc1: 4}", "names no layer that gets an adapter"),
        ("train.modules_to_save=[norm]", "vision_tower.encoder.layers.0.final.norm is called so, too"),
        ("train.modules_to_save=[multi_modal_projector.linear_1]", "what is no text decoder is left as it is"),
    ],
)
def test_towers_are_no_part_of_what_is_trained(tmp_path: Path, set_: str, said: str):
    (problem,) = problems(write_with_tower(tmp_path), set_)
    assert said in str(problem)


def test_names_of_the_loaded_text_decoder_are_accepted(tmp_path: Path):
    recipe = write_with_tower(tmp_path)
    patterns = "train.rank_pattern={q_proj: 4, layers.0.mlp.down_proj: 4, language_model.layers.1.mlp.up_proj: 2}"
    assert problems(recipe) == []
    assert problems(recipe, patterns, "train.modules_to_save=[embed_tokens, language_model.norm]") == []


def write_experts(tmp_path: Path) -> Path:
    recipe = write_project(tmp_path)
    shapes = llama_shapes(hidden=128, intermediate=256, kv=64, layers=2, vocabulary=300)
    for layer in range(2):
        for expert in range(4):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes |= {f"{name}.{part}_proj.weight": [256, 128] for part in ("gate", "up")}
            shapes[f"{name}.down_proj.weight"] = [128, 256]
    (weights,) = tmp_path.rglob("model.safetensors")
    write_safetensors(weights, shapes)
    return recipe


def test_experts_are_refused_from_the_headers(tmp_path: Path):
    recipe = write_experts(tmp_path)
    # Packed experts do not load, and nf4 leaves them in bf16, too: other problems.
    plain = ("quantize.schemes=[nf4]", "quantize.accept_unquantized=true")
    (problem,) = problems(recipe, *plain)
    dense, experts = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256), 2 * 4 * 3 * 128 * 256
    assert f"{experts / (experts + dense):.0%}" in problem.what and problem.where.endswith("train.accept_unquantized")
    assert problems(recipe, *plain, "train.accept_unquantized=true") == []
    (dropout,) = problems(recipe, *plain, "train.accept_unquantized=true", "train.dropout=0.1")
    assert dropout.where.endswith("train.dropout")


@pytest.mark.parametrize("slug", ["nf4", "int8"])
def test_a_scheme_that_leaves_most_of_a_mixture_in_bf16_has_to_be_accepted(slug: str, tmp_path: Path):
    recipe, sets = write_experts(tmp_path), (f"quantize.schemes=[{slug}]", "train.accept_unquantized=true")
    (problem,) = problems(recipe, *sets)
    assert problem.where.endswith("quantize.schemes.0") and "GiB of experts" in problem.what
    assert "quantize.accept_unquantized: true" in problem.next
    assert problems(recipe, *sets, "quantize.accept_unquantized=true") == []


def test_check_says_what_stays_in_bf16(tmp_path: Path):
    recipe, sets = write_experts(tmp_path), ("quantize.schemes=[nf4]", "evaluate.on_base=[int8]")
    training, scheme, on_base = unquantized_warnings(load(recipe, sets=sets))
    held = 2 * 2 * 4 * 3 * 128 * 256 / (1 << 30)
    assert training.what.startswith(f"{held:.1f} GiB of experts stay in bf16 in training")
    assert scheme.what.startswith(f"nf4 leaves {held:.1f} GiB of experts in bf16; its weights take ")
    assert on_base.where.endswith("evaluate.on_base.0")
    assert unquantized_warnings(load(write_project(tmp_path / "dense"))) == []


@pytest.mark.parametrize("slug", ["gptq-w4-g128", "awq-w4-g128", "rtn-w4-g128", "ct-gptq-w4-g128", "ct-awq-w4-g128"])
def test_no_backend_calibrates_experts_and_check_says_so(slug: str, tmp_path: Path):
    """So there is no scheme whose experts would see too few tokens: tokens an expert are nowhere to be logged."""
    (problem,) = problems(write_experts(tmp_path), f"quantize.schemes=[{slug}]", "train.accept_unquantized=true")
    assert "experts" in problem.what and "nf4 or int8" in problem.next and problem.where.endswith("quantize.schemes.0")


def test_processes_share_the_batch(tmp_path: Path):
    recipe = write_project(tmp_path)
    assert load(recipe, sets=("run.processes=4",)).recipe.micro_batch == 4
    for sets in (("run.processes=3",), ("run.processes=4", "run.micro_batch=8")):
        with pytest.raises(RecipeError) as refused:
            load(recipe, sets=sets)
        assert "run.processes" in str(refused.value) and "16" in str(refused.value)


def test_devices(tmp_path: Path):
    recipe = load(write_project(tmp_path), sets=("run.processes=2", "run.launcher=fsdp-qlora")).recipe
    assert [problem.where for problem in device_problems(recipe, device="cpu")] == ["run.launcher"]
    assert [problem.where for problem in device_problems(recipe, device="cuda", gpus=1)] == ["run.processes"]
    assert list(device_problems(recipe, device="cuda", gpus=2)) == []


def test_an_architecture_without_sdpa_says_what_to_set(tmp_path: Path):
    recipe = write_project(tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gemma2"}))
    (problem,) = problems(recipe)
    assert "gemma2" in problem.what and problem.next == "Set train.attention: eager."
    assert problems(recipe, "train.attention=eager") == []
