"""train.adapter: what is refused before anything starts, with every name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.checks.adapter import fit_problems
from recipes.models.adapters import read_adapter
from recipes.models.headers import read_headers
from recipes.models.weights import read_file
from recipes.problem import Problem
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
    where = only(recipe).where
    assert where.endswith("safetensors: model.layers.0.self_attn.q_proj (a part of its LoRA is missing)")
    write_safetensors(adapter, head)
    assert problems(recipe) == []


def rewrite(recipe: Path, *, base: str = "", adapter: str = "") -> None:
    """Let the base's files and the adapter name the layers as other versions and classes do."""
    for path, prefix, start in (
        (recipe.parent / "base" / "model.safetensors", base, "model."),
        (recipe.parent / "adapter" / "adapter_model.safetensors", adapter, "base_model.model.model."),
    ):
        if prefix:
            shapes = {name: list(tensor.shape) for name, tensor in read_file(path).items()}
            write_safetensors(path, {name.replace(start, prefix, 1): shape for name, shape in shapes.items()})


@pytest.mark.parametrize("base", ["", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize(
    "adapter", ["", "base_model.model.language_model.model.", "base_model.model.model.language_model."]
)
def test_names_of_other_versions_and_classes_are_known(recipe: Path, base: str, adapter: str):
    rewrite(recipe, base=base, adapter=adapter)
    assert fit(recipe) == []
    write_adapter(recipe.parent / "adapter", layers=3)
    rewrite(recipe, adapter=adapter)
    (problem,) = fit(recipe)
    assert problem.where.count("layers.2.") == 7


def test_trained_rows_saved_weights_and_biases_are_checked(recipe: Path):
    path = recipe.parent / "adapter" / "adapter_model.safetensors"
    start = "base_model.model."
    table = f"{start}model.embed_tokens"
    write_adapter(
        recipe.parent / "adapter", config={"trainable_token_indices": {"embed_tokens": [4, 7], "lm_head": [9]}}
    )
    good = {
        f"{table}.token_adapter.trainable_tokens_delta": [2, 128],
        f"{start}lm_head.token_adapter.trainable_tokens_delta": [1, 128],
        f"{start}model.layers.0.self_attn.q_proj.lora_A.weight": [4, 128],
        f"{start}model.layers.0.self_attn.q_proj.lora_B.weight": [128, 4],
        f"{start}model.layers.0.self_attn.q_proj.lora_B.bias": [128],
        f"{start}model.layers.0.self_attn.q_proj.lora_magnitude_vector": [128],
        f"{start}model.norm.weight": [128],
    }
    write_safetensors(path, good)
    assert fit(recipe) == []
    bad = {
        f"{table}.token_adapter.trainable_tokens_delta": [3, 128],
        f"{start}model.layers.0.self_attn.q_proj.lora_magnitude_vector": [64],
        f"{start}model.norm.weight": [64],
        f"{start}model.layers.0.self_attn.q_proj.lora_C.weight": [64],
    }
    write_safetensors(path, good | bad)
    (problem,) = fit(recipe)
    assert "4 part(s)" in problem.what
    for name in ("embed_tokens", "lora_magnitude_vector", "model.norm.weight", "q_proj.lora_C.weight"):
        assert name in problem.where
    write_safetensors(path, good)
    config = recipe.parent / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("[4, 7]", "[4, 300]"))  # the base has 300 rows
    assert "[4, 300]" in fit(recipe)[0].where


def test_embeddings_may_have_a_lora(recipe: Path):
    path = recipe.parent / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    write_safetensors(path, {f"{name}A": [4, 300], f"{name}B": [128, 4]})
    assert fit(recipe) == []
    write_safetensors(path, {f"{name}A": [4, 301], f"{name}B": [128, 4]})
    assert "embed_tokens (adapter [301, 128], base [300, 128])" in fit(recipe)[0].where


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"target_modules": ["q_proj", "up_proj"]}, ["0.self_attn.q_proj"]),
        ({"target_modules": r".*\.(q_proj|up_proj)"}, ["0.self_attn.q_proj"]),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, []),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, ["q_proj"]),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, []),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*q_proj"}, []),
        ({"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["q_proj"]}, []),
        ({"target_modules": "all-linear"}, []),
    ],
)
def test_a_target_that_the_file_lacks(recipe: Path, settings: dict[str, Any], missing: list[str]):
    folder = write_adapter(recipe.parent / "adapter", config=settings)
    path = folder / "adapter_model.safetensors"
    kept = {
        name: list(tensor.shape)
        for name, tensor in read_file(path).items()
        if ("q_proj" in name or "up_proj" in name) and "layers.0.self_attn" not in name
    }
    write_safetensors(path, kept)
    assert [problem.where.count("a target by") for problem in fit(recipe)] == [len(missing)] * bool(missing)
    assert all(name in fit(recipe)[0].where for name in missing)


def fit(recipe: Path) -> list[Problem]:
    return fit_problems(recipe.parent / "adapter", read_headers(recipe.parent / "base"))


@pytest.mark.parametrize(
    ("quantization", "base_type", "says"),
    [
        ({"bnb_4bit_use_double_quant": True}, "nf4", "config.json"),
        ({"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "model.vision_tower"]}, "nf4", ""),
        ({}, "unknown", "without double quantization"),
        ({"bnb_4bit_quant_type": "fp4"}, "unknown", "fp4"),
        ({"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["model.layers.0.mlp"]}, "unknown", "0.mlp"),
    ],
)
def test_what_a_config_beside_it_says_of_the_base_in_training(
    tmp_path: Path, quantization: dict[str, Any], base_type: str, says: str
):
    folder = write_adapter(tmp_path / "adapter")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | quantization
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    adapter = read_adapter(folder)
    assert adapter.base_type == base_type and says in adapter.evidence


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
