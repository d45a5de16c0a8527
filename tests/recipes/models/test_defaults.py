"""What config.json leaves out is what transformers' own class says, asked once and remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from recipes.models import defaults
from recipes.models.defaults import complete, missing_keys
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from tests.recipes.folders import write_base

GEMMA_4B = {  # the text_config of google/gemma-3-4b-it, whole
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "sliding_window": 1024,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(defaults, "_ANSWERS", {})
    yield tmp_path / "cache" / "quench" / "configs"


def folder_with(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def completed(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    text = complete(folder_with(folder, config), config)
    assert not isinstance(text, Problem), text
    return dict(text)


def test_gemma_3_of_the_hub_gets_its_heads_windows_and_vocabulary(tmp_path: Path, cache: Path):
    text = completed(tmp_path / "model", {"model_type": "gemma3", "text_config": GEMMA_4B})
    assert (text["vocab_size"], text["num_attention_heads"], text["num_key_value_heads"]) == (262_208, 8, 4)
    assert (text["head_dim"], text["max_position_embeddings"], text["tie_word_embeddings"]) == (256, 131_072, True)
    assert text["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 5 + ["sliding_attention"] * 4
    assert text["hidden_size"] == 2560 and text["sliding_window"] == 1024
    assert len(list(cache.glob("*.json"))) == 1


def test_gemma_4_of_the_hub_gets_its_global_heads_and_3n_its_shared_layers(tmp_path: Path, cache: Path):
    """`global_head_dim` is no attribute of the class: it becomes what the full layers have in place of head_dim."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "global_head_dim": 32, "sliding_window": 100, "model_type": "gemma4_text"}
    sizes |= {"num_global_key_value_heads": 1, "attention_k_eq_v": True}
    text = completed(tmp_path / "4", {"model_type": "gemma4", "text_config": sizes})
    assert [text["per_layer_config"][str(number)]["head_dim"] for number in range(6)] == [16] * 5 + [32]
    described = Headers(folder=tmp_path, config={}, text_config=text, tensors={}, linears=())
    assert described.cache_numbers(1000) == 2 * (2 * 16 * 5 * 100 + 32 * 1000) and described.kv_features == 32
    small = {"model_type": "gemma3n_text", "num_hidden_layers": 35, "hidden_size": 2048}
    text = completed(tmp_path / "3n", {"model_type": "gemma3n", "text_config": small})
    assert text["num_kv_shared_layers"] == 15 and text["sliding_window"] == 512
    described = Headers(folder=tmp_path, config={}, text_config=text, tensors={}, linears=())
    assert len(described.cache_layers) == 20 and described.cache_numbers(100) == 20 * 2 * 2 * 256 * 100


def test_the_answer_is_remembered_in_the_process_and_on_disk(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    config = {"model_type": "gemma3", "text_config": GEMMA_4B}
    first = completed(tmp_path / "model", config)

    def child(*_: object) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(defaults, "_ask", child)
    assert completed(tmp_path / "model", config) == first
    monkeypatch.setattr(defaults, "_ANSWERS", {})
    assert completed(tmp_path / "elsewhere", config) == first  # by what config.json says, not by where it is
    with pytest.raises(AssertionError, match="asked again"):
        completed(tmp_path / "other", {"model_type": "gemma3", "text_config": {**GEMMA_4B, "sliding_window": 512}})


def test_a_broken_file_in_the_cache_is_made_again_and_many_may_write(tmp_path: Path, cache: Path):
    config = {"model_type": "gemma3", "text_config": GEMMA_4B}
    first = completed(tmp_path / "model", config)
    (file,) = cache.glob("*.json")
    file.write_text(file.read_text()[:20])
    defaults._ANSWERS.clear()  # pyright: ignore[reportPrivateUsage]
    assert completed(tmp_path / "model", config) == first
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: defaults._write(file, {"vocab_size": 7}), range(64)))  # pyright: ignore[reportPrivateUsage]
    assert json.loads(file.read_text()) == {"vocab_size": 7}
    assert [path.name for path in cache.iterdir()] == [file.name]  # no part of a file is left


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert completed(tmp_path / "model", {"model_type": "gemma3", "text_config": GEMMA_4B})["vocab_size"] == 262_208


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"model_type": "llama", "num_key_value_heads": 8, "head_dim": 128}, []),
        ({"model_type": "llama", "num_key_value_heads": 8}, ["head_dim"]),
        ({"model_type": "llama", "num_key_value_heads": 8, "head_dim": None}, ["head_dim"]),
        ({"model_type": "qwen2", "num_key_value_heads": 8, "use_sliding_window": False, "sliding_window": 4096}, []),
        ({"model_type": "qwen2", "num_key_value_heads": 8}, ["layer_types", "sliding_window"]),
        (
            {"model_type": "mistral", "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None},
            ["layer_types"],
        ),
        ({"model_type": "gemma2", "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}, ["layer_types"]),
        ({"model_type": "nothing-that-transformers-has"}, []),
    ],
)
def test_nothing_is_asked_that_the_class_does_not_know(config: dict[str, Any], missing: list[str]):
    plain = {"vocab_size": 9, "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32}
    plain |= {"intermediate_size": 8, "max_position_embeddings": 8}
    assert missing_keys({**plain, **config}) == missing


def test_heads_that_the_weights_confirm_are_not_asked_for(tmp_path: Path):
    """Llama 3.1's config.json has no head_dim; its k_proj has outputs for heads of a plain size."""
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 4096, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8}
    config |= {"max_position_embeddings": 8}
    assert missing_keys(config, key_features=1024) == []
    assert missing_keys(config, key_features=2048) == ["head_dim"]


def test_a_number_that_nobody_knows_is_a_problem_and_no_guess(tmp_path: Path, cache: Path):
    config = {"model_type": "unheard-of", "hidden_size": None, "num_attention_heads": 0}
    with pytest.raises(RecipeError) as caught:
        read_headers(write_base(tmp_path / "base", config=config))
    (problem,) = caught.value.problems
    assert "hidden_size" in problem.what and "num_attention_heads" in problem.what
    assert "unheard-of" in problem.why and problem.where.endswith("config.json")
    assert not cache.exists()  # what failed is no answer


def test_a_class_that_is_an_encoder_decoder_says_so_without_its_config(tmp_path: Path, cache: Path):
    config = {"model_type": "t5gemma", "encoder": {}, "decoder": {}}
    (tmp_path / "base").mkdir()
    assert "is_encoder_decoder" in missing_keys(config)
    with pytest.raises(RecipeError) as caught:
        read_headers(write_base(tmp_path / "base", config=config))
    assert "encoder-decoder" in caught.value.problems[0].what
