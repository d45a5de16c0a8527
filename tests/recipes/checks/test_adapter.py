"""train.adapter: what is refused before anything starts, with every name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.models.headers import read_headers
from recipes.read.load import load
from tests.recipes.checks.test_check import only, problems
from tests.recipes.folders import llama_shapes, write_project, write_safetensors

SIZES = {"hidden": 128, "intermediate": 256, "kv": 64, "layers": 2, "vocabulary": 300}
RANK = 4


def write_adapter(folder: Path, *, config: dict[str, Any] | None = None, **sizes: int) -> Path:
    """A LoRA on all linear layers of a base of these sizes, as PEFT saves it."""
    folder.mkdir(exist_ok=True)
    shapes: dict[str, list[int]] = {}
    for name, shape in llama_shapes(**(SIZES | sizes)).items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            shapes |= {f"{module}.lora_A.weight": [RANK, shape[1]], f"{module}.lora_B.weight": [shape[0], RANK]}
    write_safetensors(folder / "adapter_model.safetensors", shapes)
    written = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(written | (config or {})))
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter")
    return write_project(tmp_path, extra="train:\n  adapter: adapter\n")


def test_an_adapter_that_fits_has_no_problem(recipe: Path):
    assert problems(recipe) == []
    assert load(recipe).adapter == recipe.parent / "adapter"


def test_every_training_setting_beside_it_is_refused_by_name(recipe: Path):
    ignored = problems(recipe, "train.rank=16", "train.seed=0")  # also where it is the default
    assert [problem.where for problem in ignored] == ["--set train.rank=16 train.rank", "--set train.seed=0 train.seed"]
    assert "train.rank stands beside train.adapter" in ignored[0].what


def test_a_missing_folder_names_its_neighbour(recipe: Path):
    problem = only(recipe, "train.adapter=adaptr")
    assert problem.next.endswith("adapter?") and "train.adapter" in problem.where


def test_parts_that_fit_no_weight_are_all_named(recipe: Path):
    write_adapter(recipe.parent / "adapter", intermediate=512, layers=3)
    where = only(recipe).where
    for layer in range(2):
        for name, found, base in (
            ("gate", [512, 128], [256, 128]),
            ("up", [512, 128], [256, 128]),
            ("down", [128, 512], [128, 256]),
        ):
            assert f"model.layers.{layer}.mlp.{name}_proj (adapter {found}, base {base})" in where
    assert where.count("model.layers.2.") == 7  # a layer that the base has not
    assert "q_proj (" not in where and "model.layers.0.self_attn" not in where
    assert "org/base" in only(recipe).next


def test_a_checkpoint_of_the_bare_model_and_a_tied_output_layer_fit(recipe: Path):
    base = recipe.parent / "base"
    shapes = {name.removeprefix("model."): list(tensor.shape) for name, tensor in read_headers(base).tensors.items()}
    write_safetensors(base / "model.safetensors", shapes)
    adapter = recipe.parent / "adapter" / "adapter_model.safetensors"
    head = {f"base_model.model.lm_head.lora_{part}.weight": size for part, size in (("A", [4, 128]), ("B", [300, 4]))}
    write_safetensors(adapter, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [4, 128]} | head)
    assert only(recipe).where.endswith("safetensors: model.layers.0.self_attn.q_proj")  # its B is not there
    write_safetensors(adapter, head)
    assert problems(recipe) == []


@pytest.mark.parametrize(
    ("config", "says", "remedy"),
    [
        ({"peft_type": "LOHA"}, "LOHA", "LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "olora", "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "corda", "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "loftq", "LoftQ wrote"),
    ],
)
def test_no_lora_and_a_start_that_changed_the_base(recipe: Path, config: dict[str, Any], says: str, remedy: str):
    write_adapter(recipe.parent / "adapter", config=config)
    problem = only(recipe)
    assert says in problem.what and remedy in problem.next


@pytest.mark.parametrize("start", [True, "gaussian", "eva", "orthogonal"])
def test_a_start_that_left_the_base_alone_passes(recipe: Path, start: bool | str):
    write_adapter(recipe.parent / "adapter", config={"init_lora_weights": start})
    assert problems(recipe) == []


def test_pickles_and_broken_files_are_refused(recipe: Path):
    weights = recipe.parent / "adapter" / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    assert "truncated" in only(recipe).what
    weights.rename(weights.with_name("adapter_model.bin"))
    assert "pickle" in only(recipe).why


def test_a_hub_id_says_nothing_until_it_is_pinned(recipe: Path):
    assert load(recipe, sets=["train.adapter=org/adapter"]).adapter is None
    assert problems(recipe, "train.adapter=org/adapter") == []
