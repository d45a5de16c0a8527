"""config.json and adapter_config.json of strangers: values of other types than transformers and PEFT write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.checks.check import load_and_check
from recipes.models.adapters import read_adapter
from recipes.models.headers import read_headers
from recipes.models.installed import configuration, is_known
from recipes.models.token_ids import token_problems
from recipes.problem import Problem, RecipeError
from tests.recipes.checks.test_adapter import write_adapter
from tests.recipes.folders import write_base, write_project, write_safetensors


def refused(folder: Path, config: dict[str, Any]) -> Problem:
    with pytest.raises(RecipeError) as caught:
        read_headers(write_base(folder, config=config))
    (problem,) = caught.value.problems
    assert all(problem.as_dict().values())
    return problem


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("hidden_size", "128", "hidden_size in config.json is '128'; it has to be a whole number from 0 to"),
        ("num_hidden_layers", 2.5, "it has to be a whole number"),
        ("num_key_value_heads", True, "it has to be a whole number"),
        ("vocab_size", {"a": 1}, "it has to be a whole number"),
        (
            "num_attention_heads",
            2**63,
            "is 9223372036854775808; it has to be a whole number from 0 to",
        ),
        ("hidden_size", -128, "it has to be a whole number from 0 to 1,099,511,627,776"),
        ("model_type", ["llama"], "model_type in config.json is ['llama']; it has to be a text."),
        ("model_type", {}, "it has to be a text"),
    ],
)
def test_a_size_of_another_type_is_named(tmp_path: Path, name: str, value: Any, words: str) -> None:
    problem = refused(tmp_path, {name: value})
    assert words in problem.what and problem.where.endswith(f"config.json {name}")


def test_one_in_the_text_part_too(tmp_path: Path) -> None:
    problem = refused(tmp_path, {"text_config": {"hidden_size": "128"}})
    assert problem.what.startswith("text_config.hidden_size in config.json is '128'")


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"hidden_size": ' + b"9" * 5000 + b"}", b"\xff\xfe{}", b"null"])
def test_a_config_that_cannot_be_read(tmp_path: Path, raw: bytes) -> None:
    folder = write_base(tmp_path)
    (folder / "config.json").write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        read_headers(folder)
    assert [problem.what for problem in caught.value.problems] == ["config.json is not readable JSON."]


@pytest.mark.parametrize("kind", ["../..", "/", "..", "x" * 300, "a/b", "\0", ""])
def test_a_model_type_is_no_path(kind: str) -> None:
    assert not is_known(kind) and configuration(kind) == ""


def test_known_types_stay_known() -> None:
    assert is_known("llama") and is_known("gemma3_text") and "num_key_value_heads" in configuration("llama")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": "8"}, "r is '8'; it has to be a whole number from 1 on"),
        ({"r": True}, "r is True"),
        ({"r": None}, "does not say r"),
        ({"lora_alpha": [16]}, "lora_alpha is a list; it has to be a number up to 1e18"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is an object; it has to be a text or a list of texts"),
        ({"target_modules": ["q_proj", 1]}, "target_modules is a list"),
        ({"target_modules": "(q_proj"}, "target_modules holds no regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules holds no regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; it has to be a list of texts"),
        ({"modules_to_save": ["("]}, "modules_to_save holds no regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"lora_alpha": 10**400}, "lora_alpha is a whole number; it has to be a number up to 1e18"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is an object; it has to be numbers by name"),
        ({"alpha_pattern": {"q_proj)": 8}}, "alpha_pattern holds no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern is a list"),
        ({"trainable_token_indices": {"embed_tokens": 5}}, "trainable_token_indices is an object"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices is a list"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; it has to be true or false"),
    ],
)
def test_an_adapter_config_of_another_type_is_named(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_adapter(write_adapter(tmp_path / "adapter", config=config))
    (problem,) = caught.value.problems
    assert words in problem.what and "adapter_config.json" in problem.where and all(problem.as_dict().values())


def test_what_peft_writes_for_other_kinds_is_read(tmp_path: Path) -> None:
    config = {"peft_type": "ADALORA", "rank_pattern": {"q_proj": [True, False]}}
    assert read_adapter(write_adapter(tmp_path / "adapter", config=config)).config["peft_type"] == "ADALORA"
    assert read_adapter(write_adapter(tmp_path / "oft", config={"peft_type": "OFT", "r": 0})).config["r"] == 0


def test_skipped_modules_that_are_no_list_leave_the_base_type_open(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = {"quantization_config": quantization | {"llm_int8_skip_modules": 5}}
    (folder / "config.json").write_text(json.dumps(config))
    described = read_adapter(folder)
    assert described.base_type == "unknown" and "no list of names" in described.evidence


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([4], [128, 4], "its LoRA is no pair of matrices: [4] and [128, 4]"),
        ([4, 128], [], "no pair of matrices"),
        ([4, 128], [128, 8], "the ranks of its LoRA differ: 4 and 8"),
    ],
)
def test_matrices_that_make_no_product(tmp_path: Path, a: list[int], b: list[int], words: str) -> None:
    folder = write_adapter(tmp_path / "adapter")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    write_safetensors(folder / "adapter_model.safetensors", shapes)
    with pytest.raises(RecipeError) as caught:
        load_and_check(write_project(tmp_path, extra="train:\n  adapter: adapter\n"))
    assert any(words in problem.where for problem in caught.value.problems)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"\u00b2": {"content": "x"}, "9" * 5000: {"content": "y"}, "1": 5}},
        {"eos_token": {"special": True}, "pad_token": ["x"], "bos_token": {"content": 5}},
        {"added_tokens_decoder": ["x"], "chat_template": [5, {"template": None}, {}]},
    ],
)
def test_a_tokenizer_config_of_other_types_is_read_as_far_as_it_goes(tmp_path: Path, config: dict[str, Any]) -> None:
    headers = read_headers(write_base(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    added = {"added_tokens": [{"id": 300, "content": "beyond"}, {"id": "x"}, 5], "model": {"vocab": {"a": "b"}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    (problem,) = token_problems(headers)
    assert "beyond (300)" in problem.what
