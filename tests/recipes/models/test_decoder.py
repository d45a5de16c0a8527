"""The text decoder of real checkpoints: tiny models that transformers itself wrote, and ambiguous ones by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from recipes.models.decoder import layer_number
from recipes.models.headers import Headers, read_headers
from recipes.problem import RecipeError
from tests.recipes.folders import llama_shapes, write_base, write_safetensors

TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 3, "hidden_size": 48, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
AUDIO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
SCOUT = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96}
LLAMA4_VISION = {**VISION, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Class -> model type, config, what its layers are called in the file.
COMPOSITE: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        {"text_config": {**TEXT, "sliding_window": 32}, "vision_config": VISION, "mm_tokens_per_image": 4},
        "language_model.model.layers.",
    ),
    "Qwen3_5ForConditionalGeneration": (
        "qwen3_5",
        {"text_config": {**TEXT, **DELTA_NET, "num_hidden_layers": 4}, "vision_config": QWEN_VISION},
        "model.language_model.layers.",
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {"text_config": {**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
         "vision_config": QWEN_VISION},
        "model.layers.",
    ),
    "Mistral3ForConditionalGeneration": (
        "mistral3",
        {"text_config": {**TEXT, "model_type": "mistral"},
         "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 12}},
        "language_model.model.layers.",
    ),
    "SmolVLMForConditionalGeneration": (
        "smolvlm",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": VISION},
        "model.text_model.layers.",
    ),
    "Llama4ForConditionalGeneration": (
        "llama4",
        {"text_config": {**TEXT, **SCOUT}, "vision_config": {**LLAMA4_VISION, "intermediate_size": 192}},
        "language_model.model.layers.",
    ),
    "VoxtralForConditionalGeneration": (
        "voxtral",
        {"text_config": {**TEXT, "model_type": "llama"},
         "audio_config": {**AUDIO, "num_mel_bins": 8, "max_source_positions": 20}},
        "language_model.model.layers.",
    ),
}  # fmt: skip
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**TEXT, **EXPERTS}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "MixtralForCausalLM": ("mixtral", {**TEXT, "num_local_experts": 4}),
    "OlmoeForCausalLM": ("olmoe", {**TEXT, "num_experts": 4}),
    "GptOssForCausalLM": ("gpt_oss", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoeForCausalLM": ("granitemoe", {**TEXT, "num_local_experts": 4}),
}


class Made(NamedTuple):
    """What the loaded model has: weights of its text decoder's linear layers, of its experts, of its towers."""

    folder: Path
    linears: int
    experts: int
    towers: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    import torch
    import transformers

    home = tmp_path_factory.mktemp("models")
    models: dict[str, Made] = {}
    for name, (model_type, config, *_) in {**COMPOSITE, **MIXTURES}.items():
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **config))
        model.save_pretrained(home / name)
        (home / name / "tokenizer.json").write_text("{}")
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        text = {id(p) for p in [*decoder.parameters(), *head.parameters()]}
        linear = {id(module.weight) for module in decoder.modules() if isinstance(module, torch.nn.Linear)}
        linear.discard(id(head.weight))  # Llama 4's get_decoder() is the causal LM
        parts = {"linears": 0, "experts": 0, "towers": 0}
        for full, weight in model.named_parameters():
            if id(weight) not in text:
                parts["towers"] += weight.numel()
            elif weight.dim() == 3 and "conv" not in full:
                parts["experts"] += weight.numel()
            elif id(weight) in linear and not full.endswith(("router.weight", "gate.weight", "router.layer.weight")):
                parts["linears"] += weight.numel()
        models[name] = Made(home / name, **parts)
    return models


@pytest.mark.parametrize("name", COMPOSITE)
def test_the_text_decoder_alone_is_counted(made: dict[str, Made], name: str):
    headers, model = read_headers(made[name].folder), made[name]
    assert {place[0] for layer in headers.linears if (place := layer_number(layer.name))} == {COMPOSITE[name][2]}
    assert headers.dense_linear_parameters == model.linears > 0
    assert headers.tower_parameters == model.towers > 0
    assert headers.expert_parameters == model.experts
    assert headers.vocabulary == 300 and headers.hidden == 64
    assert headers.embedding_parameters == (1 if headers.tied else 2) * 300 * 64


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_counted_however_they_are_stored(made: dict[str, Made], name: str):
    headers, model = read_headers(made[name].folder), made[name]
    assert headers.expert_parameters == model.experts > 0
    assert headers.dense_linear_parameters == model.linears
    assert headers.tower_parameters == 0
    assert not [layer.name for layer in headers.linears if "gate." in f"{layer.name}." or "router" in layer.name]
    apart = sum("experts." in layer.name for layer in headers.linears)
    assert bool(apart) != bool(headers.stacked_experts)
    assert bool(headers.stacked_experts) == (name in ("GptOssForCausalLM", "GraniteMoeForCausalLM"))


def with_shapes(folder: Path, shapes: dict[str, list[int]], **config: Any) -> Headers:
    write_base(folder, config=config)
    write_safetensors(folder / "model.safetensors", shapes)
    return read_headers(folder)


def llama(prefix: str = "model.", layers: int = 2, hidden: int = 128) -> dict[str, list[int]]:
    made = llama_shapes(hidden=hidden, intermediate=256, kv=hidden // 2, layers=layers, vocabulary=300)
    return {name.replace("model.", prefix, 1): shape for name, shape in made.items()}


def test_heads_that_predict_several_tokens_are_no_layers(tmp_path: Path):
    """DeepSeek-V3 and GLM number theirs on, Qwen3-Next calls it mtp; transformers loads none of them."""
    extra = {"mtp.layers.0.mlp.up_proj.weight": [256, 128], "mtp.fc.weight": [128, 256]}
    headers = with_shapes(tmp_path, {**llama(layers=3), **extra})  # the config says two
    assert len(headers.linears) == 14 and not [layer for layer in headers.linears if ".2." in layer.name]
    assert {tensor.name for tensor in headers.dropped} >= extra.keys()
    assert all(tensor.name.startswith(("model.layers.2.", "mtp.")) for tensor in headers.dropped)
    assert headers.tower_parameters == 0


def test_a_tower_of_the_same_size_is_told_by_its_name(tmp_path: Path):
    headers = with_shapes(tmp_path, {**llama("vision_tower."), **llama("model.")})
    assert {layer.name.partition(".")[0] for layer in headers.linears} == {"model"}
    assert headers.tower_parameters == sum(t.numel for n, t in headers.tensors.items() if n.startswith("vision"))


def test_two_stacks_that_fit_are_refused_with_what_was_found(tmp_path: Path):
    with pytest.raises(RecipeError) as caught:
        with_shapes(tmp_path, {**llama("one."), **llama("two.")})
    (problem,) = caught.value.problems
    assert "one.layers.* (2 layers), two.layers.* (2 layers)" in problem.what and "2 layers of width 128" in problem.why


@pytest.mark.parametrize(("layers", "hidden"), [(1, 128), (2, 64)])
def test_a_checkpoint_that_is_not_as_its_config_says_is_refused(tmp_path: Path, layers: int, hidden: int):
    with pytest.raises(RecipeError) as caught:
        with_shapes(tmp_path, llama(layers=layers, hidden=hidden))
    (problem,) = caught.value.problems
    assert "as config.json counts them" in problem.what and f"model.layers.* ({layers} layers)" in problem.why


def test_what_is_two_dimensional_and_no_linear_layer(tmp_path: Path):
    odd = {
        "model.layers.0.self_attn.q_norm.weight": [4, 32],  # Cohere's: a row per head
        "model.layers.0.mlp.shared_expert_gate.weight": [1, 128],
        "model.layers.0.block_sparse_moe.router.layer.weight": [4, 128],
        "model.layers.0.mlp.gate.wg.weight": [4, 128],
        "model.layers.0.mamba.A_log": [128, 16],
    }
    headers = with_shapes(tmp_path, {**llama(), **odd})
    assert len(headers.linears) == 14


def test_layers_of_a_part_that_is_counted_twice_in_config(tmp_path: Path):
    """LongCat: 28 double layers, and num_hidden_layers 56."""
    headers = with_shapes(tmp_path, llama(layers=2), num_hidden_layers=4, num_layers=2)
    assert len(headers.linears) == 14


def test_a_base_whose_embeddings_are_longer_than_its_vocabulary(tmp_path: Path):
    """Llama 3.2 Vision: eight rows more for its images."""
    shapes = {**llama(), "model.embed_tokens.weight": [308, 128], "lm_head.weight": [300, 128]}
    assert with_shapes(tmp_path, shapes).embedding_parameters == 608 * 128


def test_the_index_of_a_large_mixture_is_read_fast(tmp_path: Path):
    """DeepSeek-V3's has some 45,000 tensors."""
    shapes = llama(layers=2)
    for number in range(15_000):
        shapes |= {f"model.layers.1.mlp.experts.{number}.{part}.weight": [8, 128] for part in ("w1", "w2", "w3")}
    write_base(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", shapes)
    start = time.process_time()
    assert read_headers(tmp_path).expert_parameters == 45_000 * 8 * 128
    assert time.process_time() - start < 5  # 0.5 s on a busy core
